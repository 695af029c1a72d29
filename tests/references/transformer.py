"""The transformer over codes in float64, one query, key and head at a time."""

import math
from typing import Any

import numpy as np

ROTARY_BASE = 100.0


def logits_of(model: Any, sequences: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Logits (B, T, K) of sequences (B, T) of codes in an order (T,) of the cells."""
    return np.array([logits_of_one(model, list(sequence), list(order)) for sequence in sequences])


def logits_of_one(model: Any, sequence: list[int], order: list[int]) -> list[np.ndarray]:
    tokens, sources = [model.codes, *sequence[:-1]], [None, *order[:-1]]
    rows = [embedded(model, *step) for step in zip(tokens, sources, order, strict=True)]
    for layer in model.layers:
        inputs = [dense(layer.qkv, normalised(layer.norms[0], row)) for row in rows]
        mixed = [attention(model, inputs[: i + 1], sources[: i + 1], order[i]) for i in range(len(rows))]
        rows = [row + dense(layer.join, mix) for row, mix in zip(rows, mixed, strict=True)]
        rows = [row + dense(layer.down, gelu(dense(layer.up, normalised(layer.norms[1], row)))) for row in rows]
    return [dense(model.to_logits, normalised(model.norm, row)) for row in rows]


def embedded(model: Any, token: int, source: int | None, target: int) -> np.ndarray:
    row = array(model.embedding)[token].copy()
    if model.positions == "learned":
        for table, cell in zip(array(model.places), (source, target), strict=True):
            y, x = (-1, -1) if cell is None else divmod(int(cell), model.code_side)
            row += table[0][y] + table[1][x]
    return row


def attention(model: Any, inputs: list[np.ndarray], sources: list[int | None], target: int) -> np.ndarray:
    """Result of the last step's query for all heads."""
    d, result = model.width // model.heads, []
    for head in range(model.heads):
        part = slice(head * d, (head + 1) * d)
        query = inputs[-1][: model.width][part]
        keys = [row[model.width : 2 * model.width][part] for row in inputs]
        values = [row[2 * model.width :][part] for row in inputs]
        if model.positions == "rotary":
            query = turned(query, divmod(int(target), model.code_side))
            cells = [(-1, -1) if c is None else divmod(int(c), model.code_side) for c in sources]
            keys = [turned(key, cell) for key, cell in zip(keys, cells, strict=True)]
        scores = [float(query @ key) / math.sqrt(d) for key in keys]
        weights = [math.exp(score - max(scores)) for score in scores]
        result.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return np.concatenate(result)


def turned(vector: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """Rotate pair i of features, as complex numbers, by the row (first half of the pairs) or the column."""
    pairs = len(vector) // 2
    numbers = vector[:pairs] + 1j * vector[pairs:]
    half = pairs // 2
    for i in range(pairs):
        numbers[i] *= np.exp(1j * cell[i // half] * ROTARY_BASE ** (-(i % half) / half))
    return np.concatenate([numbers.real, numbers.imag])


def dense(layer: Any, row: np.ndarray) -> np.ndarray:
    return row @ array(layer.kernel) + array(layer.bias)


def normalised(norm: Any, row: np.ndarray) -> np.ndarray:
    return (row - row.mean()) / np.sqrt(row.var() + 1e-6) * array(norm.scale) + array(norm.bias)


def gelu(row: np.ndarray) -> np.ndarray:
    """The approximation by tanh (Hendrycks and Gimpel 2016), the default of JAX."""
    return 0.5 * row * (1 + np.tanh(math.sqrt(2 / math.pi) * (row + 0.044715 * row**3)))


def array(parameter: Any) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)
