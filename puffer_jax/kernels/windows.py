"""How the windows of a convolution lie on its images."""

from typing import NamedTuple

Pair = tuple[int, int]
"""One number for the rows and one for the columns."""


class Windows(NamedTuple):
    """How the windows of a convolution lie on its images.

    Attributes:
        strides: steps from window to window.
        pads: rows of zeros above and below each image, columns of zeros left and right of it.
        channels_first: images come in as (batch, inputs, height, width).
        rectify: a ReLU comes first, except for images of bytes, which have no negative numbers.
        out_channels_first: images go out as (batch, outputs, height, width).
    """

    strides: Pair = (1, 1)
    pads: Pair = (0, 0)
    channels_first: bool = False
    rectify: bool = False
    out_channels_first: bool = False
