"""Captions of the figures of landmarks, as templates by file name; see `report.captioned`."""

CAPTIONS = {
    "cumulative_errors": (
        "Fraction of the landmarks of {images} images with at most a given error, for the run's method (thick) and "
        "the baselines (thin). Curves further to the left are better; look at the gap between the method and the "
        "baselines."
    ),
    "error_by_landmark": (
        "Errors of each of {landmarks} landmarks in {images} images: median, quartiles, 5th and 95th percentiles, "
        "and mean with its 95 % interval. Look for landmarks with larger errors than the others."
    ),
    "class_comparison": (
        "Mean error of each of {images} images in {classes} classes (dots), with quartiles and class means with 95 %"
        " intervals. Look for classes whose interval lies above that of the normal class."
    ),
    "coverage": (
        "Fraction of the true landmarks of {images} images that lie inside their predicted confidence region, "
        "against its nominal level, with 95 % intervals. Below the diagonal the predicted uncertainties are too "
        "small."
    ),
    "examples": (
        "{shown} of {images} images, evenly spaced in the order of their mean error, with predicted landmarks, 95 % "
        "confidence regions and ground truth; crosses mark flagged landmarks. Look for errors that many images "
        "share."
    ),
    "failures": (
        "{shown} of {images} images, those with the largest mean errors, with predicted landmarks, 95 % confidence "
        "regions and ground truth. Look at whether the errors are flagged (crosses) and at what the images have in "
        "common."
    ),
    "aligned": (
        "{shown} of {images} images in the lung frame, with the landmarks of the frame. Lung borders should pass "
        "through the landmarks; distortions indicate misplaced landmarks."
    ),
}
