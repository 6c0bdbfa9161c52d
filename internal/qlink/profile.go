package qlink

import (
	"math"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
)

// reconciliationLimit is how far above the Shannon bound the leak of a block may
// lie before it is given up.
const reconciliationLimit = 1.1

// Textbook is the textbook link (single photons over 10 km of standard fibre) and
// the profile of its blocks: 5.2e6 gates, 2^18 key bits and 2^16 test bits, at
// most 2 % of errors, a secret that is 1e-10 from ideal.
func Textbook() (bb84.Params, distill.Params) {
	link := bb84.Textbook()
	return link, Profile(distill.Params{
		Gates: 5_200_000, KeyBits: 1 << 18, TestBits: 1 << 16,
		QTol: .02, PX: link.PX, EpsSec: 1e-10,
	})
}

// Profile sets what follows from the rest of p: the limit of the leak, in bits, at
// the worst error rate that passes, and the length of the secret, in bits, at the
// worst corner (bb84.SinglePhotonLength). A profile that makes no key has a length
// of 0, which Validate refuses.
func Profile(p distill.Params) distill.Params {
	p.LeakLimit = int(math.Ceil(reconciliationLimit * float64(p.KeyBits) * bb84.Entropy(p.QTol)))
	p.SecretBits = bb84.SinglePhotonLength(p.KeyBits, p.TestBits, p.QTol, float64(p.LeakLimit), distill.TagBits, p.EpsSec)
	return p
}
