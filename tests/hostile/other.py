"""Files that are not images, and images of unsupported formats."""

import struct

from samples import saved

from hostile.jpeg import make_jpeg
from hostile.parts import SMALL, Maker, written

EMPTY = "empty file"
READABLE: dict[str, Maker] = {"script after an image": lambda: saved(SMALL, "GIF") + b"<?php system(1); ?>"}
BROKEN: dict[str, Maker] = {
    EMPTY: lambda: b"",
    "one byte": lambda: b"\x89",
    "SVG with a script": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
    "HTML": lambda: b"<!doctype html><title>x</title>",
    "PDF": lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "EPS with a DOS header": lambda: (
        b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, 99, 0, 0, 0, 0, 65535) + b"%!PS-Adobe-3.0\n"
    ),
    "empty ZIP": lambda: b"PK\5\6" + b"\0" * 18,
    "ELF": lambda: b"\x7fELF\2\1\1" + b"\0" * 99,
    "Python pickle": lambda: b"\x80\4cos\nsystem\n.",
    "ICO": written("RGBA", "ICO", (32, 32)),
    "PPM": written("RGB", "PPM"),
    "TGA": written("RGB", "TGA"),
    "JPEG 2000": written("RGB", "JPEG2000"),
    "PSD": lambda: b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + b"\0" * 99,
    "script before an image": lambda: b"<?php system(1); ?>" + make_jpeg(),
}
