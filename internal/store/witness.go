package store

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
)

// Witness keeps the head of a node's audit chain, and the node's signature over it, in
// a file, outside the database: a database that has less was set back to the past, and
// one that has other events was forged. The committer writes it after
// each commit and before anything of that commit is answered.
//
// There are two records in the file, each with a checksum, written in turns and in
// place: of one that was torn the other is left. A write is not synced by itself
// (Sync is called once in a while), so the file may be behind after a power cut,
// which is no false alarm, and never after a kill.
type Witness struct {
	name string // what the records are of: a checksum of another node's does not fit
	f    *os.File

	mu     sync.Mutex
	count  uint64 // of records written; the next one goes to slot count%2
	origin int64  // 0 until Start: nothing is written
	known  handover.Figures
	sig    [ed25519.SignatureSize]byte // over the head that is known; zero while there is none
	dirty  bool
	err    error // of the last write
}

const (
	witnessSlot  = 4096 // bytes from one record to the other: in no case one sector
	witnessBody  = 8 + 8 + 8 + 8 + 8 + sha256.Size + ed25519.SignatureSize
	witnessSize  = witnessBody + sha256.Size
	witnessMagic = "kmewit02"
)

// witnessBodies are the kinds of records by their magic, and how long they are without
// the checksum. Those of an earlier release have no signature.
var witnessBodies = map[string]int{witnessMagic: witnessBody, "kmewit01": witnessBody - ed25519.SignatureSize}

// OpenWitness opens the file of a node, and makes it if it is missing.
func OpenWitness(path, node string) (*Witness, error) {
	w := &Witness{name: node}
	var err error
	if w.f, err = os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("opening the witness file: %w", err)
	}
	if err := w.read(path); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the witness file: %w", err), w.f.Close())
	}
	return w, nil
}

// read finds the newer of the records.
func (w *Witness) read(path string) error {
	var file [2 * witnessSlot]byte
	n, _ := w.f.ReadAt(file[:], 0) // what is missing is zero, which is no record
	for slot := range 2 {
		for magic, body := range witnessBodies {
			if r := file[slot*witnessSlot:][:body+sha256.Size]; string(r[:8]) == magic && bytes.Equal(w.checksum(r[:body]), r[body:]) {
				w.parse(r[:body])
			}
		}
	}
	if w.count > 0 {
		return nil
	}
	if len(bytes.Trim(file[:n], "\x00")) > 0 {
		return fmt.Errorf("%s holds no record of node %s: it is damaged, or another node's. Without it nothing here tells whether the database was restored: "+
			"if you know that it was not, delete the file", path, w.name)
	}
	// The whole file is there from the start, so that a full disk is in no write's way.
	if _, err := w.f.WriteAt(make([]byte, 2*witnessSlot), 0); err != nil {
		return err
	}
	return errors.Join(w.f.Sync(), syncFolder(path))
}

func syncFolder(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func (w *Witness) checksum(body []byte) []byte {
	h := sha256.New()
	h.Write([]byte(w.name))
	h.Write(body)
	return h.Sum(nil)
}

// A record is the magic, five numbers of 8 bytes less the magic's place, the hash,
// the signature and the checksum.
func (w *Witness) parse(r []byte) {
	number := func(i int) int64 { return int64(binary.BigEndian.Uint64(r[8*i:])) }
	if uint64(number(1)) < w.count {
		return
	}
	w.count = uint64(number(1))
	n := handover.NodeFigures{Node: w.name, Run: number(3), Seq: number(4)}
	copy(n.Head[:], r[40:])
	copy(w.sig[:], r[40+sha256.Size:])
	w.known = handover.Figures{Origin: number(2), Nodes: []handover.NodeFigures{n}}
}

func (w *Witness) format() []byte {
	n := w.known.Nodes[0]
	r := append(make([]byte, 0, witnessSize), witnessMagic...)
	for _, v := range []int64{int64(w.count), w.known.Origin, n.Run, n.Seq} {
		r = binary.BigEndian.AppendUint64(r, uint64(v))
	}
	r = append(append(r, n.Head[:]...), w.sig[:]...)
	return append(r, w.checksum(r)...)
}

// Known is what the file says of the node; of origin 0 if nothing yet.
func (w *Witness) Known() handover.Figures {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.known
}

// Signed is the last head that the file knows of the node's chain, and the node's
// signature over it.
func (w *Witness) Signed() (audit.Head, [ed25519.SignatureSize]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.known.Nodes) == 0 {
		return audit.Head{}, w.sig
	}
	n := w.known.Nodes[0]
	return audit.Head{Seq: n.Seq, Hash: n.Head}, w.sig
}

// Start has commits written from now on, as those of this origin. It is called
// when the database has been found to be no less than Known.
func (w *Witness) Start(origin int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.origin = origin
}

// Freeze has nothing written any more: what is known is evidence.
func (w *Witness) Freeze() { w.Start(0) }

// note writes where the chain stands. An error is kept for Sync: the commit has
// happened, and there are other witnesses.
func (w *Witness) note(run int64, head audit.Head, sig []byte) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.origin == 0 {
		return
	}
	w.count++
	w.known = handover.Figures{Origin: w.origin, Nodes: []handover.NodeFigures{{Node: w.name, Run: run, Seq: head.Seq, Head: head.Hash}}}
	copy(w.sig[:], sig) // a commit without events has none, and leaves the head as it is
	_, w.err = w.f.WriteAt(w.format(), int64(w.count%2)*witnessSlot)
	w.dirty = true
}

// Sync makes what was written durable, and returns what went wrong since.
func (w *Witness) Sync() error {
	w.mu.Lock()
	if w.err != nil && w.origin != 0 { // perhaps the disk has room again
		_, w.err = w.f.WriteAt(w.format(), int64(w.count%2)*witnessSlot)
		w.dirty = true
	}
	dirty, err := w.dirty, w.err
	w.dirty = false
	w.mu.Unlock()
	if dirty && err == nil {
		err = w.f.Sync()
	}
	if err != nil {
		return fmt.Errorf("keeping the witness file: %w", err)
	}
	return nil
}

// Close closes the file.
func (w *Witness) Close() error { return errors.Join(w.Sync(), w.f.Close()) }
