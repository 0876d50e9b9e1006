"""Names that are markup, for the tests of the report."""

HOSTILE_CLASSES = {
    "hue-00": "<script>document.title='run'<",
    "hue-01": '<img src=x onerror="document.title=1">',
    "hue-02": "$\\frac{1}{0}$ & 'quoted' {{ 7 * 7 }}",
}
HOSTILE_RUN = "<b onmouseover=alert(1)>bold</b> $x^2$ {{ 7 * 7 }}"
