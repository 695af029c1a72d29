"""EfficientNet-Lite0 in NumPy, float64, from the names of PyTorch: independent of the package, and slow."""

import numpy as np

EPSILON = 1e-3
# repeats, kernel, stride, expansion, features before and after: the table of TensorFlow's efficientnet_lite_builder
TABLE = "r1_k3_s1_e1_i32_o16 r2_k3_s2_e6_i16_o24 r2_k5_s2_e6_i24_o40 r3_k3_s2_e6_i40_o80 r3_k5_s1_e6_i80_o112 "
TABLE += "r4_k5_s2_e6_i112_o192 r1_k3_s1_e6_i192_o320"


def convolution(x, weight, stride, groups=1):
    """Convolution of (C, H, W) with TensorFlow's SAME padding; weight (O, I, k, k)."""
    outputs, _, size, _ = weight.shape
    sides = [-(-n // stride) for n in x.shape[1:]]
    total = [max((s - 1) * stride + size - n, 0) for s, n in zip(sides, x.shape[1:], strict=True)]
    x = np.pad(x, [(0, 0), *((t // 2, t - t // 2) for t in total)])
    result = np.zeros((outputs, *sides))
    for i in range(sides[0]):
        for j in range(sides[1]):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            if groups == 1:
                result[:, i, j] = np.tensordot(weight, window, 3)
            else:
                result[:, i, j] = (weight[:, 0] * window).sum((1, 2))
    return result


def normalised(x, tensors, name):
    weight, bias, mean, variance = (
        tensors[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(variance + EPSILON) * weight + bias


def relu6(x):
    return np.minimum(np.maximum(x, 0), 6)


def features(image, tensors):
    """Features (C, H, W) after each block and the head, of an image (3, H, W)."""
    tensors = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x = relu6(normalised(convolution(image, tensors["_conv_stem.weight"], 2), tensors, "_bn0"))
    found, number = [], 0
    for row in TABLE.split():
        repeats, _, stride, expansion, _, _ = (int(part[1:]) for part in row.split("_"))
        for repeat in range(repeats):
            block, y = f"_blocks.{number}", x
            if expansion > 1:
                y = relu6(
                    normalised(convolution(y, tensors[f"{block}._expand_conv.weight"], 1), tensors, f"{block}._bn0")
                )
            depthwise = tensors[f"{block}._depthwise_conv.weight"]
            y = convolution(y, depthwise, stride if repeat == 0 else 1, groups=len(y))
            y = relu6(normalised(y, tensors, f"{block}._bn1"))
            y = normalised(convolution(y, tensors[f"{block}._project_conv.weight"], 1), tensors, f"{block}._bn2")
            x = x + y if repeat else y
            found.append(x)
            number += 1
    return [*found, relu6(normalised(convolution(x, tensors["_conv_head.weight"], 1), tensors, "_bn1"))]


def random_tensors(seed=0):
    """A state dict with the names and shapes of the package efficientnet_lite_pytorch."""
    rng, tensors = np.random.default_rng(seed), {}

    def layer(conv, norm, shape):
        tensors[f"{conv}.weight"] = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        tensors[f"{norm}.weight"] = rng.uniform(0.5, 1.5, shape[0])
        tensors[f"{norm}.bias"] = rng.normal(0, 0.5, shape[0])
        tensors[f"{norm}.running_mean"] = rng.normal(0, 0.3, shape[0])
        tensors[f"{norm}.running_var"] = rng.uniform(0.5, 2, shape[0])
        tensors[f"{norm}.num_batches_tracked"] = np.array(7)

    layer("_conv_stem", "_bn0", (32, 3, 3, 3))
    number = 0
    for row in TABLE.split():
        repeats, size, _, expansion, before, after = (int(part[1:]) for part in row.split("_"))
        for _ in range(repeats):
            block, wide = f"_blocks.{number}", before * expansion
            if expansion > 1:
                layer(f"{block}._expand_conv", f"{block}._bn0", (wide, before, 1, 1))
            layer(f"{block}._depthwise_conv", f"{block}._bn1", (wide, 1, size, size))
            layer(f"{block}._project_conv", f"{block}._bn2", (after, wide, 1, 1))
            before, number = after, number + 1
    layer("_conv_head", "_bn1", (1280, 320, 1, 1))
    return {name: value.astype(np.float32) if value.ndim else value for name, value in tensors.items()}
