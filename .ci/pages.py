"""Make README.md from nbs/index.ipynb, and nbs/sidebar.yml from the names of the notebooks: `python .ci/pages.py`.

Needs neither Quarto nor a kernel. In README.md, Markdown cells are taken as they are; code cells become fenced blocks,
followed by their stored text output; cells with `#| hide` are left out, and of those with `#| echo: false` only the output
is shown. In the sidebar, the first digit of a notebook's name is its room.
"""
import json
import re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
notice = "<!-- Made from nbs/index.ipynb by .ci/pages.py: edit that notebook. -->"
rooms = {"0": "Words and runs", "1": "Data", "2": "Tokens", "3": "Networks", "4": "Worlds", "5": "Behaviour",
         "6": "Training and evaluation", "7": "Studies", "8": "Command line", "9": "Scale"}


def text_of(output: dict) -> str:
    "The text of one stored output of a cell, empty if it has none."
    text = output.get("text") or output.get("data", {}).get("text/plain") or ""
    return "".join(text).rstrip()


def blocks(cell: dict):
    "The Markdown blocks that one cell becomes."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown": yield source
    if cell["cell_type"] != "code": return
    directives = set(re.findall(r"^#\|\s*(.+?)\s*$", source, re.M))
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    if "hide" in directives: return
    if code and "echo: false" not in directives: yield f"```python\n{code}\n```"
    for output in cell.get("outputs", []):
        if text := text_of(output): yield f"```\n{text}\n```"


def readme(nbs: Path = root / "nbs") -> str:
    "README.md as text."
    cells = json.loads((nbs / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join([notice, *(b for c in cells for b in blocks(c) if b)]) + "\n"


def sidebar(nbs: Path = root / "nbs") -> str:
    "nbs/sidebar.yml as text: one section for each room, then the tutorials."
    sections = {title: sorted(p.name for p in nbs.glob(f"{digit}[0-9]_*.ipynb")) for digit, title in rooms.items()}
    sections["Tutorials"] = sorted(p.relative_to(nbs).as_posix() for p in nbs.glob("tutorials/*.ipynb"))
    lines = ["website:", "  sidebar:", "    contents:", "    - index.ipynb"]
    for title, names in sections.items():
        if names: lines += [f"    - section: {title}", "      contents:", *(f"      - {name}" for name in names)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (root / "README.md").write_text(readme(), encoding="utf-8")
    (root / "nbs" / "sidebar.yml").write_text(sidebar(), encoding="utf-8")
