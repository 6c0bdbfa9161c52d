package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/kme"
)

// compare is I1: under one ID both sites hold the same bytes, which only their
// tokens can show. It looks at so many atoms at most, others each time.
func (l *Lab) compare(ctx context.Context, r *Report, one, two *evidence, most int) error {
	var ids []key.ID
	for id := range one.keys {
		if _, both := two.keys[id]; both && len(ids) < most {
			ids = append(ids, id)
		}
	}
	first, err := one.open(ctx, ids)
	if err != nil {
		return err
	}
	second, err := two.open(ctx, ids)
	if err != nil {
		return err
	}
	for i, id := range ids {
		if first[i] == nil || second[i] == nil {
			continue // its epoch has ended since it was read
		}
		r.Compared++
		if !bytes.Equal(first[i], second[i]) {
			r.fail("I1", "both", "key %s has different bytes at the two sites", id)
		}
		clear(first[i])
		clear(second[i])
	}
	return nil
}

// open unwraps atoms with the site's token. Those whose epoch has ended since they were
// read are nil.
func (e *evidence) open(ctx context.Context, ids []key.ID) ([][]byte, error) {
	keks, err := e.site.keks(ctx)
	if err != nil {
		return nil, err
	}
	moduleOwner.Lock()
	defer moduleOwner.Unlock()
	if err := os.Setenv("SOFTHSM2_CONF", e.site.path("hsm", "softhsm2.conf")); err != nil {
		return nil, err
	}
	token, err := hsm.Open(ctx, hsm.Config{Module: softHSM, TokenLabel: e.site.Name, PINFile: e.site.path("hsm", "pin")})
	if err != nil {
		return nil, err
	}
	defer token.Close()
	opened := make(map[int64]*hsm.KEK) // nil: its epoch is over
	secrets := make([][]byte, len(ids))
	for i, id := range ids {
		p := e.keys[id]
		kek, known := opened[p.kek]
		if !known {
			kek, err = token.OpenKEK(ctx, keks[p.kek])
			if errors.Is(err, hsm.ErrNoKEK) {
				err = e.site.over(ctx, p.kek)
			}
			if err != nil {
				return nil, err
			}
			opened[p.kek] = kek
		}
		if kek == nil {
			continue
		}
		aad := kme.AtomAAD(nil, e.site.KME(), p.kek, p.ref, p.index, id, e.blocks[p.ref].provenance)
		if len(p.iv) != hsm.IVBytes {
			return nil, fmt.Errorf("key %s at %s has an IV of %d bytes", id, e.site.Name, len(p.iv))
		}
		if secrets[i], err = kek.Unwrap(ctx, [hsm.IVBytes]byte(p.iv), p.ct, aad); err != nil {
			return nil, fmt.Errorf("unwrapping key %s at %s: %w", id, e.site.Name, err)
		}
	}
	return secrets, nil
}

// over is nil if a KEK's epoch has come to its end by now.
func (s *Site) over(ctx context.Context, kek int64) error {
	conn, done, err := s.super(ctx)
	if err != nil {
		return err
	}
	defer done()
	var state string
	err = conn.QueryRow(ctx, "SELECT e.state FROM kme.kek k JOIN kme.epoch e USING (epoch) WHERE k.id = $1", kek).Scan(&state)
	if err == nil && (state == "open" || state == "sealed") {
		err = fmt.Errorf("KEK %d is not in the token of %s, and its epoch is %s", kek, s.Name, state)
	}
	return err
}

func (s *Site) keks(ctx context.Context) (map[int64]hsm.KEKInfo, error) {
	conn, done, err := s.super(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	rows, err := conn.Query(ctx, "SELECT id, label, pkcs11_id, check_value FROM kme.kek WHERE pkcs11_id <> ''")
	if err != nil {
		return nil, err
	}
	keks := make(map[int64]hsm.KEKInfo)
	var id int64
	var label string
	var ckaID, check []byte
	_, err = pgx.ForEachRow(rows, []any{&id, &label, &ckaID, &check}, func() error {
		if len(check) != 3 {
			return fmt.Errorf("KEK %d has a check value of %d bytes", id, len(check))
		}
		keks[id] = hsm.KEKInfo{Label: label, ID: slices.Clone(ckaID), CheckValue: [3]byte(check)}
		return nil
	})
	return keks, err
}
