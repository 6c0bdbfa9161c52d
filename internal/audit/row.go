package audit

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"

	"github.com/go-json-experiment/json"
)

// Row is an event as it is stored, and its place in the tree.
type Row struct {
	Leaf int64 // -1: it is not in the tree yet
	Node string
	Seq  int64
	Prev []byte // the hash of its chain before it
	Body []byte // the canonical text, which is the leaf
	Sig  []byte // of the node over the head after it; nil but with the last event of a commit
}

// place is what a canonical text says of its own place.
type place struct {
	node   string
	seq    int64
	action Action
}

var errNotCanonical = errors.New("the text of the event is not a canonical one")

// placeOf reads the beginning of a canonical text. It is the same for all events, so
// that what is read of each need not be parsed whole.
func placeOf(body []byte) (p place, err error) {
	rest := body
	next := func(before string, after byte) []byte {
		cut, ok := bytes.CutPrefix(rest, []byte(before))
		end := bytes.IndexByte(cut, after)
		if !ok || end < 0 {
			err = errNotCanonical
			return nil
		}
		rest = cut[end:]
		return cut[:end]
	}
	next(`{"site":"`, '"')
	p.node = string(next(`","node":"`, '"'))
	next(`","run":`, ',')
	seq := next(`,"seq":`, ',')
	next(`,"at":"`, '"')
	p.action = Action(next(`","action":"`, '"'))
	if err == nil {
		p.seq, err = strconv.ParseInt(string(seq), 10, 64)
	}
	if err != nil {
		return place{}, errNotCanonical
	}
	return p, nil
}

// ParseEvent reads a canonical text. Members that this program does not know are left
// out: those of a newer one.
func ParseEvent(body []byte) (Event, error) {
	var e Event
	if err := json.Unmarshal(body, &e); err != nil {
		return Event{}, fmt.Errorf("reading an event: %w", err)
	}
	return e, nil
}

// AppendText appends the row as a line of a bundle: leaf, node, number, hash before,
// signature or -, and text, with a tab between each.
func (r Row) AppendText(b []byte) []byte {
	b = append(strconv.AppendInt(b, r.Leaf, 10), '\t')
	b = append(append(b, r.Node...), '\t')
	b = append(strconv.AppendInt(b, r.Seq, 10), '\t')
	b = append(hex.AppendEncode(b, r.Prev), '\t')
	if r.Sig == nil {
		b = append(b, '-')
	} else {
		b = base64.StdEncoding.AppendEncode(b, r.Sig)
	}
	b = append(b, '\t')
	return append(append(b, r.Body...), '\n')
}

// ParseRow reads a line that AppendText wrote, without its end.
func ParseRow(line []byte) (Row, error) {
	f := bytes.SplitN(line, []byte{'\t'}, 6)
	if len(f) != 6 || len(f[1]) == 0 || len(f[5]) == 0 {
		return Row{}, errors.New("reading an event's line: it does not have its six fields")
	}
	r := Row{Node: string(f[1]), Body: f[5]}
	var err [4]error
	r.Leaf, err[0] = strconv.ParseInt(string(f[0]), 10, 64)
	r.Seq, err[1] = strconv.ParseInt(string(f[2]), 10, 64)
	r.Prev, err[2] = hex.AppendDecode(nil, f[3])
	if string(f[4]) != "-" {
		r.Sig, err[3] = base64.StdEncoding.Strict().AppendDecode(nil, f[4])
	}
	if err := errors.Join(err[:]...); err != nil {
		return Row{}, fmt.Errorf("reading an event's line: %w", err)
	}
	if !bytes.Equal(r.AppendText(nil), append(bytes.Clone(line), '\n')) {
		return Row{}, errors.New("reading an event's line: it is written in another way than events are")
	}
	return r, nil
}
