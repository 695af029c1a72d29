"""Captions of the figures of a classification, as templates by file name; see `report.captioned`."""

CAPTIONS = {
    "comparison": (
        "Figures of merit on {images} images in {groups} groups, with 95 % intervals: the run in the first of {methods}"
        " rows, then its baselines and the variants that were trained for comparison. The run should exceed every "
        "baseline by more than the intervals; random splits (leaks) overestimate the performance."
    ),
    "roc_curves": (
        "ROC and precision-recall curves for the class {positive} on {images} images, for the run (thick) and its "
        "baselines (thin), averaged over repeats; the band spans the repeats. Curves closer to the upper left "
        "(ROC) and upper right (precision-recall) are better."
    ),
    "confusion_matrix": (
        "Number of images by true and predicted class ({images} images, {classes} classes; mean over repeats), with "
        "the percentage of each row. Look for large entries off the diagonal: these classes are confused."
    ),
    "reliability": (
        "Accuracy against confidence for the predictions of {images} images, in bins with 95 % intervals, and the "
        "number of predictions in each bin. Below the diagonal the predictions are overconfident."
    ),
    "saliency_right": (
        "{shown} of {total} correctly classified images, the most confident ones spread over the classes, beside the"
        " saliency of the predicted class. Saliency should lie on the finding, not on borders, markings or "
        "background."
    ),
    "saliency_wrong": (
        "{shown} of {total} misclassified images, the most confident ones, beside the saliency of the predicted "
        "class. Look for wrong labels and for structures that mislead the classifier."
    ),
}
