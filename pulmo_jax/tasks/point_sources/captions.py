"""Captions of the figures of point sources, as templates by file name; see `report.captioned`."""

CAPTIONS = {
    "detection_maps": (
        "Theoretical SNR (left), calibrated SNR (middle) and one-pass flux (right) of a point source at every pixel of "
        "the field, from {frames} frames in {channels}. {axes}. Circles with numbers: sources with a {snr} "
        "SNR of at least {threshold:g} (n = {sources}), numbered as in the table; green squares, if shown: injected "
        "sources; plus sign: star; grey: no value; pointed ends of a colour bar: values beyond its range. Look for "
        "compact positive peaks well above the rest of the field; arcs and spokes around the star are residual "
        "starlight."
    ),
    "spectra": (
        "{flux} of each detected source (n = {sources}) in {channels} channels. Title: the spectrum that the source "
        "was detected with. Dots: debiased flux; thick bars: error from the likelihood; thin bars: the same times the "
        "spread of the null at that separation; dashed, if shown: injected spectrum. Look for a smooth spectrum: a "
        "companion is present in most channels, a residual speckle in few."
    ),
    "posterior": (
        "Posterior of position and flux of source {label} ({samples:,} samples). Diagonal: density of each parameter; "
        "below: pairs, with contours that enclose 68 and 95 %; dashed: normal distribution of the fit with its "
        "empirical error. Look for a posterior wider than, or displaced from, the fit, and for correlations between "
        "parameters."
    ),
    "null_distribution": (
        "SNR in the null map of this stack ({positions:,} positions, about {independent} independent), which contains "
        "noise and no source. Left: histogram; right: quantiles. Blue: theoretical SNR; vermillion: calibrated SNR, of "
        "unit spread by construction; solid black: standard normal distribution; dashed: normal distribution of the "
        "measured mean and standard deviation of the theoretical SNR; grey band: 95 % of independent values. Look at "
        "the upper tail: points above the line and outside the band mean more false alarms than in theory."
    ),
    "null_by_radius": (
        "Standard deviation of the theoretical SNR in the null map of this stack by separation from the star ({rings} "
        "rings). Dots: measured; band: 95 % interval; dashed: 1, as theory predicts. Larger values, typically close to "
        "the star, mean that the theoretical SNR overstates the significance there. The calibrated SNR is relative to "
        "this curve."
    ),
    "contrast_curve": (
        "Above: fluxes at which injected sources are detected ({separations} separations, {directions} directions "
        "each), in half of the directions (light, solid limit) and in 95 % of them (dark, dashed limit); dotted: limit "
        "of a source that is not part of its noise statistics; dots: detected sources (n = {sources}) with their "
        "errors. Below: fraction of an injected flux that a single pass recovers, with its scatter. White areas above "
        "a limit or gaps in it are fluxes that are missed; look for separations with a low throughput."
    ),
    "frames": (
        "Frames {shown} of the {frames} frames used, with their field rotation, on one asinh colour scale, in pixel "
        "values of the cube. Plus sign: star; circle: position of source 1 in that frame, where one was detected. Look "
        "for frames unlike the others, a star off the centre, and missing pixels."
    ),
    "combined_maps": (
        "Combined criterion of {epochs} epochs (left) and SNR for a constant flux (right), by position at the first "
        "date. Circles with numbers: sources above the threshold (n = {sources}), which is marked on the colour scale. "
        "Look for compact peaks above the threshold; a peak in one epoch alone spreads along possible tracks."
    ),
    "snr_by_epoch": (
        "SNR in each of {epochs} epochs along each track (n = {tracks}). Dots: single epochs; dashed: combined SNR. A "
        "real source contributes in most epochs; a chance alignment of noise rests on one or two."
    ),
    "epoch_maps": (
        "SNR maps of the {epochs} epochs on one colour scale, with the position of each track (circles, n = {tracks}) "
        "at that date. Look for a peak at the marked position in several epochs, and for residuals that only look like "
        "one."
    ),
    "orbit": (
        "Positions of the source at {epochs} dates, the best orbit, and orbits drawn from the posterior distribution "
        "(n = {orbits} samples, of which some are shown as thin grey lines). Where the drawn orbits spread, the data "
        "do not constrain the orbit."
    ),
    "null_maxima": (
        "Histograms of the highest criterion in {fields} simulated fields of noise of each kind, the threshold that "
        "follows from them, and the detected sources or, without any, the highest peak of the search (dashed). A "
        "source should lie clearly to the right of both histograms."
    ),
    "prepared_frames": (
        "Median over the {frames} frames of the middle channel, of the input (left) and of the prepared stack (right), "
        "on one asinh colour scale. Cross: position of the star. Look for a star off the cross, for remaining single "
        "bright or dark pixels, and for grey, unknown pixels."
    ),
    "bad_pixels": (
        "Left: number of frames in which each pixel of the middle channel was replaced ({permanent} pixels in all "
        "frames, counted over the channels). Right: pixels replaced in single frames ({hits} altogether), by frame; "
        "blue: kept; red crosses: left out. Look for replaced pixels that follow a structure of the image, such as the "
        "star's core: then raise bad_pixels.sigma."
    ),
    "shifts": (
        "Shift of each of the {frames} frames of the middle channel ({method}). Blue: kept; red crosses: left out. "
        "Look for jumps, which the telescope rarely makes, and for a scatter that exceeds the pointing jitter."
    ),
    "frame_scores": (
        "Correlation with the median frame, flux and spread of the {frames} frames ({kept} kept). Blue: kept; red "
        "crosses: left out; dotted: median. Look for good frames that are left out, and for bad ones that are kept: "
        "then change selection.sigma."
    ),
}
