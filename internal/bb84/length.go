package bb84

import "math"

// Entropy is the binary entropy of p in bits. Outside of 0 to 1 it is NaN.
func Entropy(p float64) float64 {
	if p == 0 || p == 1 {
		return 0
	}
	return -p*math.Log2(p) - (1-p)*math.Log2(1-p)
}

// PLOB is the most secret bits per gate that any protocol without repeaters can
// make over a fibre of transmittance eta (Pirandola, Laurenza, Ottaviani and
// Banchi 2017).
func PLOB(eta float64) float64 { return -math.Log2(1 - eta) }

// SinglePhotonLength is the length in bits of an epsSec-secret key from n bits of
// the key basis when k bits of the other basis showed no more than the fraction
// qTol of errors (Tomamichel, Lim, Gisin and Renner 2012, "Tight finite-key
// analysis for quantum cryptography"). Leak is what reconciliation revealed and
// tag what verification did (log2(1/eps_cor)), both in bits. It is 0 if there is
// no key to be had.
//
// The theorem is about a fixed length: leak must be a limit set before the block,
// not what the block happened to need.
func SinglePhotonLength(n, k int, qTol, leak, tag, epsSec float64) int {
	if n <= 0 || k <= 0 || !(epsSec > 0 && epsSec < 1) || !(qTol >= 0) || !(leak >= 0) || !(tag >= 0) {
		return 0
	}
	phase := qTol + samplingDeviation(n, k, epsSec)
	if !(phase < .5) {
		return 0
	}
	l := math.Floor(float64(n)*(1-Entropy(phase)) - leak - tag - 1 + 2*math.Log2(epsSec))
	return int(max(l, 0))
}

// samplingDeviation is how far the error rate of n unseen bits may lie above that
// of k random test bits, but for a chance that epsSec covers (mu in the paper).
func samplingDeviation(n, k int, epsSec float64) float64 {
	nf, kf := float64(n), float64(k)
	return math.Sqrt((nf + kf) / (nf * kf) * (kf + 1) / kf * math.Log(4/epsSec))
}
