"""Pictures as files, each written whole: PNGs, labelled grids, the strip of a training's snapshots."""

import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.folders import whole_file


def to_pil(image: Tensor) -> Image.Image:
    """A picture [3, H, W] in 0…1 as a PIL image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def save_png(image: Image.Image, file: Path) -> None:
    """Write `file`, whole or not at all."""
    with whole_file(file) as part:
        image.save(part, format="PNG")


def save_images(images: Tensor, folder: Path) -> None:
    """Write pictures [N, 3, H, W] as folder/sample_000.png, sample_001.png, …; older samples there are removed."""
    files = [folder / f"sample_{index:03d}.png" for index in range(len(images))]
    for image, file in zip(images, files, strict=True):
        save_png(to_pil(image), file)
    for old in set(folder.glob("sample_*.png")) - set(files):
        old.unlink()


@cache
def characters(font: str) -> frozenset[int]:
    """The code points that a font file has a shape for; none if it cannot be used."""
    try:
        ImageFont.truetype(font, size=11)
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along, or, if it lacks characters of `text`, the font that lacks least."""
    wanted = {ord(character) for character in text if not character.isspace()}
    fonts = [font_manager.findfont("DejaVu Sans")]
    if not wanted <= characters(fonts[0]):
        fonts += sorted(font_manager.findSystemFonts())
    return ImageFont.truetype(min(fonts, key=lambda font: len(wanted - characters(font))), size=size)


def save_grid(rows: dict[str, Tensor], columns: Sequence[str], file: Path, cell: int = 256) -> None:
    """One labelled picture: a row of pictures [N, 3, H, W] for each entry of `rows`, under a title for each column.

    Pictures are shown at most `cell` pixels wide.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    scale = min(1.0, cell / max(height, width))
    height, width = round(height * scale), round(width * scale)
    font = font_for("".join((*columns, *rows)), size=max(11, width // 11))

    def fit(title: str) -> str:
        letter = max(font.getlength("n"), font.getlength(" ".join(title.split())) / max(1, len(title)))
        return textwrap.fill(title, max(4, int(width / letter)), max_lines=4, placeholder=" …")

    titles = [fit(text) for text in columns]
    line = font.getbbox("Ag")[3] + 3
    top = 8 + line * max(title.count("\n") + 1 for title in titles)
    names = [textwrap.fill(name, 18, max_lines=6, placeholder=" …") for name in rows]
    left = 16 + round(max(font.getlength(part) for name in names for part in name.split("\n")))
    grid = Image.new("RGB", (left + (width + 4) * len(columns), top + (height + 4) * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for x, title in enumerate(titles):
        draw.multiline_text((left + x * (width + 4), 4), title, fill="black", font=font, spacing=3)
    for y, (name, images) in enumerate(zip(names, rows.values(), strict=True)):
        row_top = top + y * (height + 4)
        draw.multiline_text((8, row_top + height // 2), name, fill="black", font=font, spacing=3, anchor="lm")
        for x, image in enumerate(images):
            grid.paste(to_pil(image).resize((width, height)), (left + x * (width + 4), row_top))
    save_png(grid, file)


def save_strip(folder: Path, prompts: Sequence[str]) -> None:
    """folder/steps.png: the teacher and every snapshot in `folder`, one row each, a column for each prompt.

    folder/step-N.png: the teacher and the last one.
    """

    def read(snapshot: Path) -> Tensor:
        files = [snapshot / f"sample_{i:03d}.png" for i in range(len(prompts))]
        pictures = [torch.frombuffer(bytearray(Image.open(f).tobytes()), dtype=torch.uint8) for f in files]
        width, height = Image.open(files[0]).size
        return torch.stack([p.view(height, width, 3).permute(2, 0, 1).float() / 255 for p in pictures])

    snapshots = sorted(folder.glob("step_*/"), key=lambda path: int(path.name.removeprefix("step_")))
    snapshots = [s for s in snapshots if len(list(s.glob("sample_*.png"))) >= len(prompts)]
    rows = {"teacher": read(folder / "teacher")}
    rows |= {f"step {snapshot.name.removeprefix('step_')}": read(snapshot) for snapshot in snapshots}
    save_grid(rows, prompts, folder / "steps.png", cell=128)
    last = list(rows)[-1]
    latest = {name: rows[name] for name in ("teacher", last)}
    save_grid(latest, prompts, folder / f"{last.replace(' ', '-')}.png", cell=128)
