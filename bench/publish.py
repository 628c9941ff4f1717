"""Put measured tables where people read them."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
ACCURACY, README = ROOT / "docs" / "accuracy.md", ROOT / "README.md"


def publish(page: pathlib.Path, name: str, text: str) -> None:
    """Replace what stands between two comments of a page.

    Raises:
        ValueError: If the page has no such comments.
    """
    begin, end = f"<!-- {name}: written by bench -->\n", f"\n<!-- end of {name} -->"
    content = page.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise ValueError(f"{page} has no place for {name!r}.")
    before, rest = content.split(begin)
    page.write_text(before + begin + text + end + rest.split(end)[1], encoding="utf-8")
