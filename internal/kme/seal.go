package kme

import (
	"encoding/binary"
	"time"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// The formats of the additional authenticated data that binds a blob to its row:
// whoever moves a blob to another key, taker, link, site or KEK gets a blob that
// does not open.
const (
	atomFormat = "kme/atom/1"
	dueFormat  = "kme/due/1"
)

// AtomAAD is the additional authenticated data of a pool atom: each field as
// uvarint length and bytes, in this order.
func AtomAAD(b []byte, site identity.KME, kek int64, ref handover.BlockRef, index int, id key.ID, p key.Provenance) []byte {
	b = appendText(b, atomFormat)
	b = appendText(b, site.String())
	b = appendNumber(b, kek)
	b = appendText(b, ref.Link)
	b = appendNumber(b, ref.Session)
	b = appendNumber(b, ref.Block)
	b = appendNumber(b, int64(index))
	b = appendBytes(b, id[:])
	b = appendText(b, string(p))
	return appendNumber(b, key.AtomBits)
}

// DueAAD is the additional authenticated data of a key that waits for one SAE.
func DueAAD(b []byte, site identity.KME, kek int64, id key.ID, master, taker identity.SAE, bits int, p key.Provenance, expires time.Time, reread bool) []byte {
	b = appendText(b, dueFormat)
	b = appendText(b, site.String())
	b = appendNumber(b, kek)
	b = appendBytes(b, id[:])
	b = appendText(b, master.String())
	b = appendText(b, taker.String())
	b = appendNumber(b, int64(bits))
	b = appendText(b, string(p))
	b = appendNumber(b, expires.UnixMilli())
	if reread {
		return appendText(b, "reread")
	}
	return appendText(b, "")
}

func appendText(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendBytes(b, s []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// appendNumber writes v as 8 bytes, big-endian, behind their length.
func appendNumber(b []byte, v int64) []byte {
	b = binary.AppendUvarint(b, 8)
	return binary.BigEndian.AppendUint64(b, uint64(v))
}
