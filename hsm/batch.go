//go:build cgo

package hsm

/*
#include "cryptoki.h"
#include "registers.h"

// operation is the sealing or opening of one blob.
struct operation {
	num aad_len, text_len; // what goes in
	num room, want;        // how much may come out, and how much must
	num rv, len;           // what the module said, and how much has come out
	int begun;             // Init was well: rv is that of C_Encrypt or C_Decrypt
};

// gcm does n whole operations in one crossing, and says how many it did. It stops at the
// first that fails, and before the next one when nobody waits for it any more. in has the
// IV, the associated data and the text of each, one after the other; out has the room for
// what comes out, likewise. IV and tag lengths are constants here because SoftHSM takes an
// empty IV or a tag of no bits without complaint.
static num gcm(init_fn *init, data_fn *data, num session, num key,
               struct operation *op, num n, byte *in, byte *out, int *left) {
	for (num i = 0; i < n; i++, op++) {
		byte *aad = in + 12, *text = aad + op->aad_len;
		struct gcm_params p = {in, 12, 96, aad, op->aad_len, 128};
		struct mechanism m = {0x1087, &p, sizeof p}; // CKM_AES_GCM
		if (i > 0 && __atomic_load_n(left, __ATOMIC_RELAXED)) return i;
		op->len = op->room;
		op->begun = 0;
		if ((op->rv = init(session, &m, key)) != 0) return i;
		op->begun = 1;
		if ((op->rv = data(session, text, op->text_len, out, &op->len)) != 0 || op->len != op->want) return i;
		in = text + op->text_len;
		out += op->room;
	}
	return n;
}

static num seal(struct functions *f, num session, num key, struct operation *op, num n, byte *in, byte *out, int *left) {
	num done = gcm(f->at[ENCRYPT_INIT], f->at[ENCRYPT], session, key, op, n, in, out, left);
	forget();
	return done;
}

static num unseal(struct functions *f, num session, num key, struct operation *op, num n, byte *in, byte *out, int *left) {
	num done = gcm(f->at[DECRYPT_INIT], f->at[DECRYPT], session, key, op, n, in, out, left);
	forget();
	return done;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// turnItems is how many blobs are sealed or opened in one turn in the module, and in one
// crossing to C: to get in costs as much as one of them, and whoever waits for a turn
// waits for all.
const turnItems = 16

// batch is what is sealed, or opened, in one turn, laid out for C. It is its own: what
// its maker gave may be wiped and used again at once. It has one owner after the other,
// its maker and whoever calls the module with it; the last one ends it.
type batch struct {
	kek *KEK
	way direction
	n   int
	ops [turnItems]C.struct_operation
	in  []byte // of each its IV, associated data and text
	out []byte // of each its room
}

// direction is what is done with a batch, as errors say it.
type direction string

const (
	sealing direction = "wrapping"
	opening direction = "unwrapping"
)

// batches are those that have ended: nothing is left in them but room.
var batches = sync.Pool{New: func() any { return new(batch) }}

// forSealing lays out one more text. blob is how long it must be when it is sealed.
func (b *batch) forSealing(iv, aad, plain []byte, blob int) error {
	if len(iv) != IVBytes || len(plain) == 0 || blob != len(plain)+TagBytes {
		return fmt.Errorf("sealing refused: IV of %d bytes, payload of %d, room for %d", len(iv), len(plain), blob)
	}
	b.add(iv, aad, plain, blob, blob)
	return nil
}

// forOpening lays out one more blob. There is room for the tag as well, which some
// modules want.
func (b *batch) forOpening(iv, aad, blob []byte) error {
	if len(iv) != IVBytes || len(blob) <= TagBytes {
		return fmt.Errorf("opening refused: IV of %d bytes, blob of %d", len(iv), len(blob))
	}
	b.add(iv, aad, blob, len(blob), len(blob)-TagBytes)
	return nil
}

func (b *batch) add(iv, aad, text []byte, room, want int) {
	b.ops[b.n] = C.struct_operation{aad_len: C.num(len(aad)), text_len: C.num(len(text)), room: C.num(room), want: C.num(want)}
	b.n++
	b.in = append(append(append(b.grown(len(iv)+len(aad)+len(text)), iv...), aad...), text...)
}

// grown is in with room for so much more: what it grows out of is wiped.
func (b *batch) grown(more int) []byte {
	if cap(b.in)-len(b.in) >= more {
		return b.in
	}
	old := b.in
	b.in = append(make([]byte, 0, max(2*cap(old), len(old)+more)), old...)
	clear(old)
	return b.in
}

// results makes the room for what comes out, which is not the batch's: it outlives it.
func (b *batch) results() {
	room := 0
	for i := range b.n {
		room += int(b.ops[i].room)
	}
	b.out = make([]byte, room)
}

// result is what came out of the i-th. Nobody who appends to it gets at the next one.
func (b *batch) result(i int) []byte {
	_, at := b.start(i)
	end := at + int(b.ops[i].want)
	return b.out[at:end:end]
}

// start is where in in and out the i-th begins.
func (b *batch) start(i int) (in, out int) {
	for j := range i {
		in += IVBytes + int(b.ops[j].aad_len+b.ops[j].text_len)
		out += int(b.ops[j].room)
	}
	return in, out
}

// end gives the batch back. What came out stays with those who have it.
func (b *batch) end() {
	clear(b.in)
	b.kek, b.n, b.in, b.out = nil, 0, b.in[:0], nil
	batches.Put(b)
}

// discard ends the batch, and nothing is left of what came out.
func (b *batch) discard() {
	clear(b.out)
	b.end()
}

// nobodyLeaves is for those who wait for the module whatever it does.
var nobodyLeaves atomic.Int32

// seal encrypts what is in b, and returns how much of it: all, unless there is an error.
// When left is not 0 any more, it does not begin another one.
func (m *module) seal(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, b *batch, left *atomic.Int32) (int, error) {
	n := int(C.seal(m.functions, C.num(s), C.num(key), &b.ops[0], C.num(b.n), first(b.in), first(b.out), (*C.int)(unsafe.Pointer(left))))
	return n, b.failure(n, "C_Encrypt")
}

// unseal decrypts what is in b, from the i-th on, and returns how much of b is done.
// errRefused says that the module takes the next one for changed.
func (m *module) unseal(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, b *batch, i int, left *atomic.Int32) (int, error) {
	in, out := b.start(i)
	n := i + int(C.unseal(m.functions, C.num(s), C.num(key), &b.ops[i], C.num(b.n-i), first(b.in[in:]), first(b.out[out:]), (*C.int)(unsafe.Pointer(left))))
	err := b.failure(n, "C_Decrypt")
	if err != nil && b.ops[n].begun != 0 && slices.Contains(dataErrors, pkcs11.Error(b.ops[n].rv)) {
		err = fmt.Errorf("%w: %w", errRefused, err)
	}
	return n, err
}

// errLeft: the module has stopped before the next one, since nobody waits any more.
var errLeft = errors.New("nobody waits for the rest")

// errRefused: C_Decrypt gave the answer of a wrong tag, and perhaps of a broken token.
var errRefused = errors.New("blob refused")

// dataErrors are what modules answer to a wrong tag. SoftHSM says GENERAL_ERROR,
// which is also what it says when it is broken.
var dataErrors = []pkcs11.Error{
	pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_DATA_INVALID,
	pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE,
	0x42, // CKR_AEAD_DECRYPT_FAILED, PKCS#11 v3.0
}

// failure says why only n were done; nil if that is all.
func (b *batch) failure(n int, call string) error {
	if n == b.n {
		return nil
	}
	switch op := &b.ops[n]; {
	case op.begun == 0 && op.rv == pkcs11.CKR_OK:
		return errLeft
	case op.begun == 0:
		return fault(call+"Init", pkcs11.Error(op.rv))
	case op.rv != pkcs11.CKR_OK:
		return fault(call, pkcs11.Error(op.rv))
	default:
		return fault(fmt.Sprintf("%s gave %d bytes, not %d", call, op.len, op.want), pkcs11.Error(pkcs11.CKR_DEVICE_ERROR))
	}
}

// sealOne encrypts plain into blob, which must have room for exactly the tag more.
func (m *module) sealOne(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, iv, aad, plain, blob []byte) error {
	b := batches.Get().(*batch)
	defer b.end()
	if err := b.forSealing(iv, aad, plain, len(blob)); err != nil {
		return err
	}
	b.out = blob
	_, err := m.seal(s, key, b, &nobodyLeaves)
	return err
}

// unsealOne decrypts blob, and returns the payload, which the caller wipes.
func (m *module) unsealOne(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, iv, aad, blob []byte) ([]byte, error) {
	b := batches.Get().(*batch)
	if err := b.forOpening(iv, aad, blob); err != nil {
		b.end()
		return nil, err
	}
	b.results()
	if _, err := m.unseal(s, key, b, 0, &nobodyLeaves); err != nil {
		b.discard()
		return nil, err
	}
	plain := b.result(0)
	b.end()
	return plain, nil
}
