"""Captions of the figures that every training has, as templates by file name; see `report.captioned`."""

TRAINING_CAPTIONS = {
    "loss_curves": (
        "Loss on training batches (blue) and on the validation data (red, circle: lowest) against training step "
        "({steps} steps); below, learning rate and norm of the gradient where logged. Look for a validation loss that "
        "rises again (overfitting) and for jumps in the gradient norm (instability)."
    ),
    "time_shares": (
        "Wall-clock time of this training by activity (total {seconds:.0f} s, percentages of it in the legend). A "
        "large share of waiting for batches means that reading the data, and not the model, limits the speed."
    ),
    "profile": (
        "Time per training step by kind of operation of the compiled program, from a trace of some steps, summed over "
        "concurrent threads; percentages refer to that sum. Look for a single operation that dominates."
    ),
}
