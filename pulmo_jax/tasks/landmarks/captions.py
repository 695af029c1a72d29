"""Captions of the figures of landmarks, as templates by file name; see `report.captioned`."""

_MARKS = (
    " Orange dots: predicted landmarks; orange ellipses: their 95 % confidence regions; blue diamonds: true landmarks; "
    "red crosses: predictions flagged as low quality. Above each image: file and mean error."
)

CAPTIONS = {
    "cumulative_errors": (
        "Fraction of the {landmarks} landmarks of {images} {data} whose distance from the true position is at most a "
        "given error. Thick: the run's method; thin: baselines; the legend gives the median errors. Curves further to "
        "the left are better: look at the gap between the method and the best baseline."
    ),
    "error_by_landmark": (
        "Distance from the true position for each of {landmarks} landmarks in {images} {data}. Boxes: median and "
        "quartiles; whiskers: 5th and 95th percentiles; red dots: mean with its 95 % bootstrap interval over groups. "
        "Look for landmarks with larger errors than the others."
    ),
    "class_comparison": (
        "Mean error of each of {images} {data} in {classes} classes. Light dots: images; boxes: median and quartiles; "
        "whiskers: 5th and 95th percentiles; red dots: class mean with its 95 % bootstrap interval over groups. Look "
        "for classes whose interval lies above that of the normal class."
    ),
    "coverage": (
        "Fraction of the true landmarks of {images} {data} that lie inside their predicted confidence region, against "
        "the nominal level of the region. Band: 95 % bootstrap interval over groups of images; dashed: perfect "
        "calibration; dotted: levels 0.68 and 0.95. Below the diagonal the predicted uncertainties are too small, "
        "above it too large."
    ),
    "examples": (
        "{shown} of {images} {data}, evenly spaced in the order of their mean error, from the smallest to the largest."
        + _MARKS
        + " Look for errors that many images share."
    ),
    "failures": (
        "{shown} of {images} {data}, those with the largest mean errors."
        + _MARKS
        + " Look at whether the errors are flagged, and at what the images have in common."
    ),
    "aligned": (
        "{shown} of {images} {data}, transformed into the lung frame by their predicted landmarks. Dots: the landmarks "
        "of the frame, at the same place in every image. Lung borders should pass through the landmarks; distortions "
        "indicate misplaced landmarks."
    ),
}
