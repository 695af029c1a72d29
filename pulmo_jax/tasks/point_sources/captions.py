"""Captions of the figures of point sources, as templates by file name; see `report.captioned`."""

CAPTIONS = {
    "detection_maps": (
        "SNR and flux of a point source at every pixel of the field ({frames} frames, {channels} channel(s)). "
        "Numbered marks: detections above {threshold:g} (n = {sources}). Look for compact positive peaks well above "
        "the rest of the field; arcs and spokes around the star are residual starlight."
    ),
    "spectra": (
        "Flux of each detection (n = {sources}) in {channels} channels, in units of the PSF. Thick bars: error from "
        "the likelihood; thin bars: empirical error. Look for a smooth spectrum: a companion is present in most "
        "channels, a residual speckle in few."
    ),
    "null_distribution": (
        "Distribution and quantiles of the SNR in the null map ({positions:,} positions, about {independent} "
        "independent), compared with the standard normal distribution. Look at the upper tail: points above the line"
        " and outside the band mean more false alarms than in theory."
    ),
    "null_by_radius": (
        "Standard deviation of the SNR in the null map by separation ({rings} rings), with 95 % intervals. Theory "
        "predicts 1; larger values, typically close to the star, mean that the SNR overstates the significance "
        "there."
    ),
    "contrast_curve": (
        "Detection limit by separation ({separations} separations, {directions} directions each) with and without "
        "correction for throughput, detected sources (n = {sources}), and throughput: the fraction of an injected "
        "flux that is recovered. Sources above the solid curve are detectable; look for separations with a low "
        "throughput."
    ),
    "frames": (
        "Frames {shown} of {frames} with their field rotation, and the position of source 1 where one was detected. "
        "Look for frames unlike the others, a star off the centre, and missing pixels."
    ),
    "combined_maps": (
        "Combined criterion of {epochs} epochs and SNR for a constant flux, by position at the first date. Marks: "
        "detections (n = {sources}). Look for compact peaks above the threshold that is marked on the colour scale."
    ),
    "snr_by_epoch": (
        "SNR in each of {epochs} epochs along each track (n = {tracks}), and the combined SNR (dashed). A real "
        "source contributes in most epochs; a chance alignment of noise rests on one or two."
    ),
    "epoch_maps": (
        "SNR maps of the {epochs} epochs, with the position of each track (n = {tracks}) at that date. Look for a "
        "peak at the marked position in several epochs."
    ),
    "orbit": (
        "Positions at {epochs} dates, the best orbit, and orbits drawn from the posterior (n = {orbits} samples, "
        "some of them shown). Where the drawn orbits spread, the data do not constrain the orbit."
    ),
    "null_maxima": (
        "Highest criterion in {fields} fields of noise of each kind, the threshold, and the detections or, without "
        "any, the highest peak of the search (dashed). A detection should lie clearly to the right of both "
        "histograms."
    ),
}
