package qlink

import (
	"crypto/rand"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
)

// TestEndAtRest: an end whose link is at rest, and which says and asks nothing, notices that
// the channel has ended; and so it does that the other end speaks out of turn.
func TestEndAtRest(t *testing.T) {
	t.Parallel()
	terms := func(int, int) distill.Terms { return distill.Terms{} }
	type source interface {
		Gone() <-chan struct{}
		Close()
	}
	for name, open := range map[string]func(distill.Channel) (source, error){
		"filler": func(ch distill.Channel) (source, error) {
			return NewFiller(FillerConfig{End: handover.Alice, Channel: ch, Atoms: 1, Random: rand.Reader, Terms: terms})
		},
		"upstream": func(ch distill.Channel) (source, error) {
			return NewUpstream(UpstreamConfig{End: handover.Alice, Channel: ch, Device: new(devices), Keys: 1, Terms: terms})
		},
	} {
		for how, end := range map[string]func(*end, func()){
			"it ends": func(_ *end, hangUp func()) { hangUp() },
			"out of turn": func(bob *end, _ func()) {
				for range 3 {
					if err := bob.Send(kindFill, nil); err != nil {
						t.Error(err)
					}
				}
			},
		} {
			alice, bob, hangUp := newWires()
			s, err := open(alice)
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-s.Gone():
				t.Errorf("%s: the channel has ended before it did", name)
			default:
			}
			end(bob, hangUp)
			select {
			case <-s.Gone():
			case <-time.After(time.Minute):
				t.Fatalf("%s, %s: nobody has noticed", name, how)
			}
			s.Close()
			hangUp()
		}
	}
}

// TestEar: what came before the end is heard, and then why it came.
func TestEar(t *testing.T) {
	t.Parallel()
	there := make(chan letter, 3)
	for kind := range byte(2) {
		there <- letter{kind, nil}
	}
	close(there)
	e := newEar(letters{nil, there})
	e.wait()
	for kind := range byte(2) {
		if got, _, err := e.Recv(); err != nil || got != kind {
			t.Errorf("message %d: got %d, %v", kind, got, err)
		}
	}
	for range 2 {
		if _, _, err := e.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v", err)
		}
	}
}
