"""How released files name what our parts hold. Texts alone: no tensor is looked at.

GCA-HNG saves the state dictionary of its whole model, ResNet-50's unused classifier included:
    feature_extractor.fc.0 / fc.1            BatchNorm1d and Linear of the head
    feature_extractor.backbone.model.*       ResNet-50, torchvision's names
    feature_extractor.backbone.*             GoogLeNet (torchvision's names) or DINO's ViT-S/16 (facebook's)
    gnn.*, softmax_classifier.*              graph network and classifier
SCT's code saves that of torchvision's ResNet-18, ResNet-50 or GoogLeNet whose `fc` is the embedding Linear.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gcahng.compat.graph_names import graph_name, released_graph_name
from gcahng.errors import ConfigError

GCA_HNG, SCT = "gca_hng", "sct"
METRIC_MODEL, GRAPH, CLASSIFIER = "metric_model", "graph", "classifier"
PARTS = (METRIC_MODEL, GRAPH, CLASSIFIER)
_NETWORK = "backbone.network."
_WRAPPER = "module."
_EXTRACTOR = "feature_extractor."
_GRAPH, _CLASSIFIER = "gnn.", "softmax_classifier."
# Behind the features, in no use: classifiers and auxiliary heads.
_BACKBONE_HEADS = {GCA_HNG: ("fc.", "head.", "aux1.", "aux2."), SCT: ("aux1.", "aux2.")}
_NAMED = 3


@dataclass(frozen=True)
class Naming:
    """How one file writes names.

    Attributes:
        kind: `gca_hng` or `sct`: whose code saved it.
        wrapper: `module.` (DataParallel) before every name, or nothing.
        extractor: `feature_extractor.` before the metric model's names, or nothing.
        head: What follows before `0` (BatchNorm1d) and `1` (Linear): `fc.` or nothing. Of GCA-HNG alone.
        backbone: What follows before the backbone's names: `backbone.model.` or `backbone.`. Of GCA-HNG alone.
    """

    kind: str
    wrapper: str = ""
    extractor: str = ""
    head: str = ""
    backbone: str = ""

    def own_name(self, name: str) -> tuple[str, str] | None:
        """Part and name of an entry in our modules; None for one that the released code has in no use.

        Raises:
            KeyError: The released code has no such entry.
        """
        if not name.startswith(self.wrapper):
            raise KeyError(name)
        rest = name.removeprefix(self.wrapper)
        if self.kind == GCA_HNG and rest.startswith(_GRAPH):
            own = graph_name(rest.removeprefix(_GRAPH))
            return None if own is None else (GRAPH, own)
        if self.kind == GCA_HNG and rest.startswith(_CLASSIFIER):
            return CLASSIFIER, rest.removeprefix(_CLASSIFIER)
        if any(rest.startswith(f"{self.extractor}{self.backbone}{head}") for head in _BACKBONE_HEADS[self.kind]):
            return None
        for theirs, ours in self._prefixes():
            if rest.startswith(theirs):
                return METRIC_MODEL, ours + rest.removeprefix(theirs)
        raise KeyError(name)

    def released_name(self, part: str, name: str) -> str:
        """The name in the file of an entry of our module `part`.

        Raises:
            KeyError: The released code has no such entry.
        """
        if part == METRIC_MODEL:
            for theirs, ours in self._prefixes():
                if name.startswith(ours):
                    return self.wrapper + theirs + name.removeprefix(ours)
        if self.kind == GCA_HNG and part == GRAPH:
            return self.wrapper + _GRAPH + released_graph_name(name)
        if self.kind == GCA_HNG and part == CLASSIFIER:
            return self.wrapper + _CLASSIFIER + name
        raise KeyError(f"{part}: {name}")

    def _prefixes(self) -> list[tuple[str, str]]:
        """Beginnings of the metric model's names, theirs and ours; the more special one first."""
        if self.kind == SCT:
            return [("fc.", "head.linear."), ("", _NETWORK)]
        head = self.extractor + self.head
        own = [(f"{head}0.", "head.norm."), (f"{head}1.", "head.linear.")]
        return [*own, (self.extractor + self.backbone, _NETWORK)]


def naming_of_names(names: Iterable[str]) -> Naming:
    """How a file with these names writes them.

    Raises:
        ConfigError: Neither GCA-HNG's code nor SCT's writes such names.
    """
    names = list(names)
    wrapper = _WRAPPER if names and all(name.startswith(_WRAPPER) for name in names) else ""
    bare = [name.removeprefix(wrapper) for name in names]
    extractor = _EXTRACTOR if _any(bare, _EXTRACTOR) else ""
    if extractor or _any(bare, "backbone.", "fc.0.", _GRAPH, _CLASSIFIER):
        head = "fc." if not extractor or _any(bare, f"{extractor}fc.") else ""
        backbone = "backbone.model." if _any(bare, f"{extractor}backbone.model.") else "backbone."
        return Naming(GCA_HNG, wrapper, extractor, head, backbone)
    if {"fc.weight", "conv1.weight"} <= set(bare) or {"fc.weight", "conv1.conv.weight"} <= set(bare):
        return Naming(SCT, wrapper)
    shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    raise ConfigError(
        "The file is no released checkpoint: expected names like `feature_extractor.fc.1.weight` (GCA-HNG), "
        "`backbone.model.conv1.weight` (its metric model alone) or `conv1.weight` with `fc.weight` (SCT), got "
        f"{shown}. For weights of a backbone set model.weights."
    )


def naming_of_model(backbone: str, head: str) -> Naming:
    """How the authors' code would name a metric model of ours.

    Args:
        backbone: `model.backbone`.
        head: `model.head`: GCA-HNG's has a BatchNorm (`bn_linear`), SCT's has none (`linear`).
    Raises:
        ConfigError: Neither code has such a model.
    """
    architecture = backbone.split(".")[0]
    if head == "linear" and architecture in ("resnet18", "resnet50", "torchvision/googlenet"):
        return Naming(SCT)
    if head == "bn_linear" and architecture == "resnet50":
        return Naming(GCA_HNG, "", _EXTRACTOR, "fc.", "backbone.model.")
    if head == "bn_linear" and architecture in ("torchvision/googlenet", "vit_small_patch16_224"):
        return Naming(GCA_HNG, "", _EXTRACTOR, "fc.", "backbone.")
    raise ConfigError(
        f"The authors' code has no metric model of `model.backbone` {backbone} with `model.head` {head}: expected "
        "resnet50, torchvision/googlenet or vit_small_patch16_224 with bn_linear (GCA-HNG), or resnet18, resnet50 or "
        "torchvision/googlenet with linear (SCT). Use launch/export.py."
    )


def _any(names: Iterable[str], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in names)
