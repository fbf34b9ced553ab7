"""Relevance on the terminal, as an HTML page and as a PNG.

Every function takes plain values: the tokens or the image, and one tensor of relevance per method. Red is
positive and blue is negative everywhere, 0 is uncoloured, and the colour scale is symmetric.
"""

from fxlrp.report._values import Scale, rgb
from fxlrp.report.html import render_html, write_html
from fxlrp.report.image import save_image
from fxlrp.report.terminal import print_image, print_tokens, render_image, render_tokens

__all__ = [
    "Scale",
    "print_image",
    "print_tokens",
    "render_html",
    "render_image",
    "render_tokens",
    "rgb",
    "save_image",
    "write_html",
]
