package failpoint

// The failpoints, in the order in which a key passes them. Names lists them all.
const (
	EncLeased           = "enc-leased"            // atoms chosen from the lease
	EncUnwrapped        = "enc-unwrapped"         // plain bytes in memory, nothing told
	EncAnnounceSent     = "enc-announce-sent"     // the batch is on its way
	EncAnnounceAnswered = "enc-announce-answered" // the peer has committed
	EncDeleted          = "enc-deleted"           // rows deleted, not committed
	EncCommitted        = "enc-committed"         // committed, not answered
	EncHalfAnswered     = "enc-half-answered"     // some of the answer is written

	DecUnwrapped = "dec-unwrapped"
	DecUpdated   = "dec-updated"
	DecCommitted = "dec-committed"

	PadSpent = "pad-spent" // that of a block, whose tag has not left

	IntakeDistilled     = "intake-distilled"
	IntakeWrapped       = "intake-wrapped"
	IntakeHeldCommitted = "intake-held-committed"
	IntakeHeldSent      = "intake-held-sent"
	IntakeReady         = "intake-ready"

	PeerAnnounceReceived  = "peer-announce-received"
	PeerAnnounceCommitted = "peer-announce-committed"
	PeerVoidReceived      = "peer-void-received"

	GrantCommitted     = "grant-committed"      // chunks given, nothing told
	PeerGrantCommitted = "peer-grant-committed" // chunks taken, not acknowledged

	TakeoverBumped = "takeover-bumped" // the lower runs can commit nothing any more
	TakeoverBurned = "takeover-burned" // what they had announced and not served is gone; their chunks are not free yet

	EpochKEKPlanned   = "epoch-kek-planned"   // a KEK is written down, and not in the token
	EpochKEKMade      = "epoch-kek-made"      // it is in the token, and not registered
	EpochSealed       = "epoch-sealed"        // recorded, as the next ones
	EpochDraining     = "epoch-draining"      //
	EpochCopyClosed   = "epoch-copy-closed"   // this node's copy of a KEK is gone, which is not recorded
	EpochKEKDestroyed = "epoch-kek-destroyed" // a KEK is gone from the token, which is not recorded
	EpochDestroyed    = "epoch-destroyed"     //
	EpochDropped      = "epoch-dropped"       //
)

// Names is every failpoint there is.
var Names = []string{
	EncLeased, EncUnwrapped, EncAnnounceSent, EncAnnounceAnswered, EncDeleted, EncCommitted, EncHalfAnswered,
	DecUnwrapped, DecUpdated, DecCommitted,
	PadSpent,
	IntakeDistilled, IntakeWrapped, IntakeHeldCommitted, IntakeHeldSent, IntakeReady,
	PeerAnnounceReceived, PeerAnnounceCommitted, PeerVoidReceived,
	GrantCommitted, PeerGrantCommitted,
	TakeoverBumped, TakeoverBurned,
	EpochKEKPlanned, EpochKEKMade, EpochSealed, EpochDraining, EpochCopyClosed, EpochKEKDestroyed, EpochDestroyed, EpochDropped,
}
