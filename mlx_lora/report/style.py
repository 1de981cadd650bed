"""The style sheet of the page: light and dark, wide and narrow, on paper."""

LIGHT = {
    "page": "#f7f7f5", "card": "#ffffff", "ink": "#1c1c1e", "quiet": "#5c6066",
    "rule": "#dcdcd8", "accent": "#1f5fa8", "heat": "#84aad6",
    "good": "#17683a", "warn": "#8a4b00", "bad": "#b3261e",
    "good-wash": "#e6f2ea", "warn-wash": "#fbf0df", "bad-wash": "#fbe9e7",
    "c0": "#1f5fa8", "c1": "#b84c00", "c2": "#007a59", "c3": "#a64d80", "c4": "#8f6400",
    "c5": "#21749f", "c6": "#6a4fb3", "c7": "#5c6066",
}  # fmt: skip
DARK = {
    "page": "#131416", "card": "#1c1e21", "ink": "#e8e8e6", "quiet": "#a3a7ad",
    "rule": "#393d42", "accent": "#7db4f0", "heat": "#2b5585",
    "good": "#6cc98b", "warn": "#e8b45c", "bad": "#ff8a80",
    "good-wash": "#1a2a20", "warn-wash": "#2d2517", "bad-wash": "#331e1d",
    "c0": "#7db4f0", "c1": "#f0915a", "c2": "#4cc3a0", "c3": "#e29cc4", "c4": "#e6b84c",
    "c5": "#69c0e8", "c6": "#ab98ec", "c7": "#a3a7ad",
}  # fmt: skip
SHADES = 10  # of a heat table (u0 to u9), and of lines from the first block to the last (t0 to t9)
RULES = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main,header,footer,nav ul{max-width:1180px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 10px}
h3{font-size:1rem;margin:22px 0 8px}
p{margin:6px 0;max-width:75ch;overflow-wrap:anywhere}
nav{position:sticky;top:0;background:var(--page);border-bottom:1px solid var(--rule);z-index:1}
nav ul{display:flex;flex-wrap:wrap;gap:4px 15px;list-style:none;padding-top:8px;padding-bottom:8px;
overflow-x:auto;white-space:nowrap;font-size:.92rem}
a{color:var(--accent)}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:18px 20px;margin:18px 0;scroll-margin-top:72px}
.quiet{color:var(--quiet);font-size:.9rem}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr));
gap:18px 14px}
.answer{border-left:5px solid var(--c7);padding:2px 0 2px 14px}
.answer h3{margin:0 0 2px;color:var(--quiet);font-weight:500;font-size:.9rem}
.answer .big{font-size:1.06rem;font-weight:600;line-height:1.35}
.answer.good .big,.mark.good{color:var(--good)}
.answer.warn .big,.mark.warn{color:var(--warn)}
.answer.bad .big,.mark.bad{color:var(--bad)}
.mark{font-weight:600;white-space:nowrap}
.box{border-left:5px solid;padding:8px 14px;margin:12px 0;border-radius:0 6px 6px 0}
.box.warn{background:var(--warn-wash)}.box.bad{background:var(--bad-wash)}
.good{border-color:var(--good)}.warn{border-color:var(--warn)}.bad{border-color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));
gap:18px 24px}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:.92rem;margin-bottom:2px}
svg{display:block;width:100%;height:auto;max-width:520px;overflow:hidden}
svg text{font:11px system-ui,sans-serif;fill:var(--quiet)}
.grid{stroke:var(--rule);stroke-width:1}
.limit{stroke:var(--warn);stroke-dasharray:4 3}
svg text.limit{stroke:none;fill:var(--warn)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.dots{fill:none;stroke-linecap:round}
.faint{opacity:.4}
.whisker{stroke-width:2.5;stroke-linecap:round}
.bar{fill:var(--c0)}.bar.once{fill:var(--c2)}.bar.unaccounted{fill:var(--c7)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:2px 0 0;padding:0;
font-size:.85rem;color:var(--quiet)}
.key{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:6px;
vertical-align:middle}
.key.spot{width:5px;height:5px;border-radius:50%;margin-left:4px}
.wide{overflow-x:auto;margin:10px 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);
vertical-align:top;font-weight:400}
td:last-child{overflow-wrap:anywhere}
thead th{color:var(--quiet);font-size:.85rem;white-space:nowrap}
td.n,th.n{text-align:right}
table.heat td,table.heat th{padding:4px 8px;text-align:center;border:1px solid var(--card)}
table.heat td,table.heat th{white-space:nowrap;overflow-wrap:normal}
table.heat tbody th{color:var(--quiet);text-align:right}
.low{outline:2px solid var(--warn);outline-offset:-2px}
.b2{background:color-mix(in srgb,var(--good) 9%,var(--card))}
.b3{background:color-mix(in srgb,var(--warn) 9%,var(--card))}
.b4{background:color-mix(in srgb,var(--warn) 30%,var(--card))}
.b5{background:color-mix(in srgb,var(--bad) 38%,var(--card));font-weight:700}
.text{white-space:pre-wrap;overflow-wrap:anywhere;overflow:hidden;contain:paint;
font:.9rem/1.45 ui-monospace,Menlo,Consolas,monospace;margin:2px 0 8px;unicode-bidi:plaintext}
pre.text{background:var(--page);border-radius:6px;padding:8px 10px;max-height:24em;overflow:auto}
code{font:.92em ui-monospace,Menlo,Consolas,monospace;background:var(--page);border-radius:4px;
padding:1px 3px}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:8px 28px}
.problem{margin:14px 0;padding-top:8px;border-top:1px solid var(--rule)}
.whose{margin:0;color:var(--quiet);font-size:.85rem}
.prompt{font-weight:600;margin:0 0 4px;overflow-wrap:anywhere;unicode-bidi:plaintext}
summary{cursor:pointer;color:var(--accent);padding:4px 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:8px 0}
dt{color:var(--quiet)}dd{margin:0;overflow-wrap:anywhere}
footer{color:var(--quiet);font-size:.85rem;padding-bottom:40px}
@media (max-width:600px){main,header,footer,nav ul{padding-left:12px;padding-right:12px}
nav ul{flex-wrap:nowrap}section{padding:14px 12px}table.heat td,table.heat th{padding:4px 5px}
dl{grid-template-columns:1fr}dd{margin-bottom:6px}}
@media print{nav{display:none}section{break-inside:avoid;border:0;padding:0}}
"""


def sheet() -> str:
    """The whole style sheet."""
    colours = [f".c{i}{{stroke:var(--c{i})}}.key.c{i},.dot.c{i}{{background:var(--c{i});"
               f"fill:var(--c{i})}}" for i in range(8)]  # fmt: skip
    gradient = [
        f".t{i}{{stroke:color-mix(in srgb,var(--c1) {round(100 * i / (SHADES - 1))}%,var(--c0))}}"
        for i in range(SHADES)
    ]
    shades = [
        f".u{i}{{background:color-mix(in srgb,var(--heat) {round(100 * i / (SHADES - 1))}%,"
        "var(--card))}"
        for i in range(SHADES)
    ]
    dark = f"@media (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}"
    return "".join(
        [
            f":root{{{variables(LIGHT)}}}",
            dark,
            RULES.replace("\n", ""),
            *colours,
            *gradient,
            *shades,
        ]
    )


def variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())
