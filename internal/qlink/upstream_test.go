package qlink

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// devices are two that have the same keys; spoil says what is wrong with them.
type devices struct {
	keys  map[key.ID][]byte
	spoil string
	from  [2]key.Provenance // as the one at either end has it
}

// Draw makes keys.
func (d *devices) Draw(_ context.Context, n int) (names []key.ID, bits []byte, from key.Provenance, err error) {
	if d.spoil == "dry" {
		return nil, nil, "", errors.New("no keys are stored")
	}
	for range n {
		var name key.ID
		k := make([]byte, key.AtomBytes)
		_, _ = rand.Read(name[:])
		_, _ = rand.Read(k)
		names, bits, d.keys[name] = append(names, name), append(bits, k...), k
	}
	switch d.spoil {
	case "twice":
		names[1] = names[0]
	case "few":
		names, bits = names[1:], bits[key.AtomBytes:]
	}
	return names, bits, d.from[0], nil
}

// Find hands them out once.
func (d *devices) Find(_ context.Context, names []key.ID) (bits []byte, from key.Provenance, err error) {
	for _, name := range names {
		k, ok := d.keys[name]
		if !ok || d.spoil == "lost" {
			return nil, "", fmt.Errorf("no key %s", name)
		}
		delete(d.keys, name)
		bits = append(bits, k...)
	}
	if d.spoil == "other bytes" {
		bits[len(bits)-1] ^= 1
	}
	return bits, d.from[1], nil
}

// letters is an end of a classical channel in memory.
type letters struct{ out, in chan letter }

type letter struct {
	kind byte
	body []byte
}

func (f letters) Send(kind byte, body ...[]byte) error {
	f.out <- letter{kind, bytes.Join(body, nil)}
	return nil
}

func (f letters) Recv() (byte, []byte, error) {
	got, ok := <-f.in
	if !ok {
		return 0, nil, io.EOF
	}
	return got.kind, got.body, nil
}

// TestUpstream: both ends come to the same block from what their devices hand out; one
// that comes to nothing ends neither the session nor the next block.
func TestUpstream(t *testing.T) {
	t.Parallel()
	d := &devices{keys: make(map[key.ID][]byte)}
	there, back := make(chan letter, 1), make(chan letter, 1)
	const keys = key.ChunkAtoms + 6
	alice, err := NewUpstream(UpstreamConfig{
		End: handover.Alice, Link: "l", Session: 3, Channel: letters{there, back}, Device: d, Keys: keys,
		Terms: func(atoms, _ int) distill.Terms {
			return distill.Terms{Epoch: 7, Owners: string(handover.Share(atoms, 0, 0))}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	bob, err := NewUpstream(UpstreamConfig{
		End: handover.Bob, Link: "l", Session: 3, Channel: letters{back, there}, Device: d,
		Accept: func(_ distill.Terms, atoms int) error {
			if atoms != keys {
				return fmt.Errorf("%d atoms", atoms)
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	type end struct {
		Block
		err error
	}
	his, done := make(chan end), make(chan struct{})
	go func() {
		defer close(done)
		for {
			b, err := bob.Next(context.Background())
			if errors.Is(err, io.EOF) {
				return
			}
			his <- end{b, err}
		}
	}()
	aborted := func(e end, reason string, peer bool) bool {
		a, ok := errors.AsType[*distill.Abort](e.err)
		return ok && a.Reason == reason && a.Peer == peer && len(e.Bits) == 0 && e.Session == 3
	}
	var last int64
	for _, spoil := range []string{"", "dry", "lost", "few", "other bytes", "twice", "simulated there", "simulated here", ""} {
		d.spoil, d.from = spoil, [2]key.Provenance{key.Upstream, key.Upstream}
		from := key.Upstream
		switch spoil {
		case "simulated there":
			d.from[0], from = key.Simulated, key.Simulated
		case "simulated here":
			d.from[1], from = key.Simulated, key.Simulated
		}
		b, err := alice.Next(t.Context())
		a := end{b, err}
		if spoil == "dry" || spoil == "few" || spoil == "twice" { // and Bob has heard nothing
			if !errors.Is(err, ErrDevice) || len(b.Bits) > 0 {
				t.Errorf("%s: %v", spoil, err)
			}
			continue
		}
		z := <-his
		switch spoil {
		case "lost":
			if !aborted(a, ReasonFind, true) || !aborted(z, ReasonFind, false) {
				t.Errorf("%s: %v at Alice's end, %v at Bob's", spoil, a.err, z.err)
			}
		case "other bytes":
			if !aborted(a, ReasonDiffer, false) || !aborted(z, ReasonDiffer, true) {
				t.Errorf("%s: %v at Alice's end, %v at Bob's", spoil, a.err, z.err)
			}
		default:
			if a.err != nil || z.err != nil {
				t.Fatalf("%v at Alice's end, %v at Bob's", a.err, z.err)
			}
			a.Took, z.Took = 0, 0
			if diff := cmp.Diff(a.Block, z.Block); diff != "" {
				t.Errorf("Alice's block and Bob's (-alice +bob):\n%s", diff)
			}
			if a.Block.Block <= last || a.Atoms() != keys || len(a.Upstream) != keys || a.Provenance != from || a.Transcript == [32]byte{} {
				t.Errorf("after block %d: block %d of %d atoms with %d names, %s", last, a.Block.Block, a.Atoms(), len(a.Upstream), a.Provenance)
			}
			last = a.Block.Block
		}
	}
	close(there)
	<-done
	bob.Close()
	close(back)
	alice.Close()
	if last < 2 {
		t.Error("no block after those that came to nothing")
	}
}

// TestUpstreamRefuses: what the other end may say that is not a block.
func TestUpstreamRefuses(t *testing.T) {
	t.Parallel()
	name := func(n int) (list []string) {
		for i := range n {
			list = append(list, fmt.Sprintf("%q", key.ID{15: byte(i), 0: 1}))
		}
		return list
	}
	for what, body := range map[string]string{
		"no JSON":        "{",
		"no keys":        `{"block":1,"names":[],"epoch":1,"owners":"a"}`,
		"too many":       `{"block":1,"names":[` + strings.Join(name(MaxUpstream+1), ",") + `],"epoch":1,"owners":"aab"}`,
		"one key twice":  `{"block":1,"names":[` + name(1)[0] + "," + name(1)[0] + `],"epoch":1,"owners":"a"}`,
		"an old block":   `{"block":0,"names":[` + name(1)[0] + `],"epoch":1,"owners":"a"}`,
		"terms of a lie": `{"block":1,"names":[` + name(1)[0] + `],"epoch":9,"owners":"a"}`,
	} {
		there := make(chan letter, 1)
		bob, err := NewUpstream(UpstreamConfig{
			End: handover.Bob, Channel: letters{make(chan letter, 1), there}, Device: &devices{spoil: "never asked"},
			Accept: func(terms distill.Terms, _ int) error {
				if terms.Epoch == 9 {
					return errors.New("not this clock's epoch")
				}
				return nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		there <- letter{kindDrawn, []byte(body)}
		_, err = bob.Next(t.Context())
		if _, abort := errors.AsType[*distill.Abort](err); err == nil || abort {
			t.Errorf("%s: %v, want the session to end", what, err)
		}
		close(there)
		bob.Close()
	}
}
