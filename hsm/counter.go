//go:build cgo

package hsm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Counter returns the value last given to SetCounter under name, by whatever
// process; 0 if there was none.
func (t *Token) Counter(ctx context.Context, name string) (value int64, err error) {
	err = t.with(ctx, fmt.Sprintf("reading counter %q", name), func(s pkcs11.SessionHandle) error {
		counts, err := t.m.counts(s, name)
		for _, c := range counts {
			value = max(value, c)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return value, nil
}

// SetCounter keeps value, which is not negative, under name in the token. It
// witnesses how far a node has come, so it refuses to go back. The new value is
// written as an object of its own before the old ones are destroyed, and the
// highest counts: a crash in between loses nothing.
func (t *Token) SetCounter(ctx context.Context, name string, value int64) error {
	return t.alone(ctx, fmt.Sprintf("setting counter %q to %d", name, value), func(s pkcs11.SessionHandle) error {
		counts, err := t.m.counts(s, name)
		if err != nil {
			return err
		}
		if value < 0 {
			return errors.New("a counter is not negative")
		}
		there := false
		for _, c := range counts {
			if c > value {
				return fmt.Errorf("it stands at %d and never goes back", c)
			}
			there = there || c == value
		}
		if !there {
			v := binary.BigEndian.AppendUint64(nil, uint64(value))
			if _, err := t.m.CreateObject(s, append(counter(name), pkcs11.NewAttribute(pkcs11.CKA_VALUE, v))); err != nil {
				return fault("C_CreateObject", err)
			}
		}
		for o, c := range counts {
			if c == value {
				continue
			}
			if err := t.m.DestroyObject(s, o); err != nil {
				return fault("C_DestroyObject", err)
			}
		}
		return nil
	})
}

// counter matches the objects of the counter called name.
func counter(name string) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, "qkd kme counter"),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, name),
	}
}

// counts reads every object of the counter.
func (m *module) counts(s pkcs11.SessionHandle, name string) (map[pkcs11.ObjectHandle]int64, error) {
	objects, err := m.find(s, counter(name))
	if err != nil {
		return nil, err
	}
	counts := make(map[pkcs11.ObjectHandle]int64, len(objects))
	for _, o := range objects {
		got, err := m.get(s, o, pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil))
		if err != nil {
			return nil, err
		}
		if len(got[0].Value) != 8 {
			return nil, fmt.Errorf("value of %d bytes, want 8", len(got[0].Value))
		}
		counts[o] = int64(binary.BigEndian.Uint64(got[0].Value))
	}
	return counts, nil
}
