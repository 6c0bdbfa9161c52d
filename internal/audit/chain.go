package audit

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"
)

// Head is a node's chain after its event number Seq. The zero Head is the chain
// of a node that has recorded nothing.
type Head struct {
	Seq  int64
	Hash [sha256.Size]byte
}

// chainPrefix separates the chain's hashes from any other use of SHA-256.
const chainPrefix = "kme/audit/1\x00"

// Append completes e as the next event of the chain, appends its canonical text
// to buf and returns the longer buf and the new head. The text is what follows
// the old length of buf.
func (h Head) Append(buf []byte, e *Event) ([]byte, Head) {
	e.Seq = h.Seq + 1
	start := len(buf)
	buf = e.AppendText(buf)
	return buf, Head{Seq: e.Seq, Hash: link(h.Hash, buf[start:])}
}

func link(prev [sha256.Size]byte, body []byte) [sha256.Size]byte {
	d := sha256.New()
	d.Write([]byte(chainPrefix))
	d.Write(prev[:])
	d.Write(body)
	return [sha256.Size]byte(d.Sum(nil))
}

// Next verifies that an event stored with number seq, previous hash prev and text
// body follows h, and returns the head after it.
func (h Head) Next(seq int64, prev, body []byte) (Head, error) {
	if seq != h.Seq+1 {
		return Head{}, fmt.Errorf("event %d follows event %d", seq, h.Seq)
	}
	if subtle.ConstantTimeCompare(prev, h.Hash[:]) != 1 {
		return Head{}, fmt.Errorf("event %d: its previous hash is not that of event %d", seq, h.Seq)
	}
	return Head{Seq: seq, Hash: link(h.Hash, body)}, nil
}

// AppendText appends the canonical text of e: one JSON object, members in the
// order below, those that are empty left out, times in UTC milliseconds.
func (e *Event) AppendText(b []byte) []byte {
	w := writer{b: append(b, '{')}
	w.text("site", e.Site)
	w.text("node", e.Node)
	w.number("run", e.Run)
	w.number("seq", e.Seq)
	w.name("at")
	w.b = append(w.b, '"')
	w.b = e.At.UTC().AppendFormat(w.b, "2006-01-02T15:04:05.000Z07:00")
	w.b = append(w.b, '"')
	w.text("action", string(e.Action))
	w.text("outcome", string(e.Outcome))
	w.text("reason", e.Reason)
	w.text("request", e.Request)
	w.text("route", e.Route)
	if e.Actor != (Actor{}) {
		w.name("actor")
		w.b = append(w.b, '{')
		w.text("role", e.Actor.Role)
		w.text("id", e.Actor.ID)
		w.text("gateway", e.Actor.Gateway)
		w.text("rule", e.Actor.Rule)
		w.text("serial", e.Actor.Serial)
		w.text("issuer", e.Actor.Issuer)
		w.text("fingerprint", e.Actor.Fingerprint)
		w.text("subject", e.Actor.Subject)
		w.text("remote", e.Actor.Remote)
		w.text("tls", e.Actor.TLS)
		w.b = append(w.b, '}')
	}
	w.list("policy", e.Policy)
	w.list("approvals", e.Approvals)
	w.text("link", e.Link)
	w.text("peer", e.Peer)
	w.text("master", e.Master)
	w.list("slaves", e.Slaves)
	if len(e.Keys) > 0 {
		w.name("keys")
		w.b = append(w.b, '[')
		for i, id := range e.Keys {
			if i > 0 {
				w.b = append(w.b, ',')
			}
			w.b = append(w.b, '"')
			w.b, _ = id.AppendText(w.b) // never fails
			w.b = append(w.b, '"')
		}
		w.b = append(w.b, ']')
	}
	if len(e.Atoms) > 0 {
		w.name("atoms")
		w.b = append(w.b, '[')
		for i, a := range e.Atoms {
			if i > 0 {
				w.b = append(w.b, ',')
			}
			w.b = append(w.b, '{')
			w.text("link", a.Link)
			w.number("session", a.Session)
			w.number("block", a.Block)
			w.name("first")
			w.b = strconv.AppendInt(w.b, int64(a.First), 10)
			w.number("count", int64(a.Count))
			w.b = append(w.b, '}')
		}
		w.b = append(w.b, ']')
	}
	w.number("bits", int64(e.Bits))
	w.number("count", int64(e.Count))
	w.text("provenance", string(e.Provenance))
	if e.Reread {
		w.name("reread")
		w.b = append(w.b, "true"...)
	}
	w.text("peer_node", e.PeerNode)
	w.number("peer_run", e.PeerRun)
	w.number("batch", e.Batch)
	w.list("follows", e.Follows)
	if e.Facts != (Facts{}) {
		w.name("facts")
		w.b = append(w.b, '{')
		w.text("build", e.Facts.Build)
		w.text("config", e.Facts.Config)
		w.text("policies", e.Facts.Policies)
		w.text("clock", e.Facts.Clock)
		w.text("key", e.Facts.Key)
		w.b = append(w.b, '}')
	}
	return append(w.b, '}')
}

// Clock is the precision of an event's time.
const Clock = time.Millisecond

// writer appends JSON members; it writes the comma that the next one needs.
type writer struct{ b []byte }

func (w *writer) name(n string) {
	if w.b[len(w.b)-1] != '{' {
		w.b = append(w.b, ',')
	}
	w.b = append(w.b, '"')
	w.b = append(w.b, n...)
	w.b = append(w.b, '"', ':')
}

func (w *writer) text(n, v string) {
	if v == "" {
		return
	}
	w.name(n)
	w.string(v)
}

func (w *writer) number(n string, v int64) {
	if v == 0 {
		return
	}
	w.name(n)
	w.b = strconv.AppendInt(w.b, v, 10)
}

func (w *writer) list(n string, vs []string) {
	if len(vs) == 0 {
		return
	}
	w.name(n)
	w.b = append(w.b, '[')
	for i, v := range vs {
		if i > 0 {
			w.b = append(w.b, ',')
		}
		w.string(v)
	}
	w.b = append(w.b, ']')
}

// string writes v as RFC 8259 asks, with every control character escaped and
// whatever is not UTF-8 replaced.
func (w *writer) string(v string) {
	const hexDigits = "0123456789abcdef"
	w.b = append(w.b, '"')
	for _, r := range v {
		switch {
		case r == '"' || r == '\\':
			w.b = append(w.b, '\\', byte(r))
		case r < 0x20 || r == 0x7f:
			w.b = append(w.b, '\\', 'u', '0', '0', hexDigits[r>>4], hexDigits[r&15])
		default:
			w.b = utf8.AppendRune(w.b, r)
		}
	}
	w.b = append(w.b, '"')
}
