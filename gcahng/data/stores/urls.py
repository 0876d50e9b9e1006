"""URLs of shard folders: taken apart, put together, and shown without their secrets."""

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from gcahng.errors import ConfigError

_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_QUERY = re.compile(r"(://[^\s?#'\"]*|/[^\s?#'\"]*)\?[^\s#'\"]*")


def redact(text: str) -> str:
    """The text without user names, passwords and queries of the URLs in it: they hold tokens and signatures."""
    return _QUERY.sub(r"\1?***", _USER.sub("***@", text))


@dataclass(frozen=True)
class WebFolder:
    """An http(s) URL of a folder.

    Attributes:
        scheme: "http" or "https".
        host: Host and port, without user and password.
        path: Of the folder, percent-encoded, without a slash at its end.
        query: Goes to every file, for example a token.
        user: "user:password" for basic authentication, or None.
    """

    scheme: str
    host: str
    path: str
    query: str
    user: str | None

    @staticmethod
    def parse(url: str) -> "WebFolder":
        """Take a URL apart.

        Raises:
            ConfigError: It is no http(s) URL with a host.
        """
        try:
            parts = urlsplit(url)
            _ = parts.port  # raises for one that is no number
        except ValueError as error:
            raise ConfigError(f"{redact(url)!r} is no URL ({error}). Write it as https://host/folder.") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{redact(url)!r} is no http(s) URL with a host. Write it as https://host/folder.")
        user, _, host = parts.netloc.rpartition("@")
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~").rstrip("/")
        return WebFolder(parts.scheme, host, path, parts.query, unquote(user) if user else None)

    def file(self, name: str) -> str:
        """URL of a file of the folder, with the query and without the user."""
        return urlunsplit((self.scheme, self.host, f"{self.path}/{quote(name)}", self.query, ""))

    @property
    def origin(self) -> tuple[str, str]:
        """Scheme and host: the user's password goes to no other."""
        return self.scheme, self.host.lower()

    def shown(self) -> str:
        """The folder's URL for messages."""
        user = "***@" if self.user else ""
        return f"{self.scheme}://{user}{self.host}{self.path}" + ("?***" if self.query else "")
