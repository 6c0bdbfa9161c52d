package policies

import (
	"maps"
	"sync"
	"sync/atomic"
)

// Current is the Set in force: that of the files, less the callers who are switched
// off beside them. It is replaced as a whole, so that whoever asks once for a Set
// judges by one state of everything.
type Current struct {
	set atomic.Pointer[Set]

	mu      sync.Mutex // held by whoever makes the next Set; guards what follows
	files   *Set
	off     map[string]string
	changed chan struct{}
}

// NewCurrent returns a Current whose Set is s.
func NewCurrent(s *Set) *Current {
	c := &Current{files: s, changed: make(chan struct{})}
	c.set.Store(s)
	return c
}

// Set is the Set in force.
func (c *Current) Set() *Set { return c.set.Load() }

// Changed is closed when the Set in force now is so no longer.
func (c *Current) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// Replace puts the Set of new files in force. Who was switched off stays so.
func (c *Current) Replace(files *Set) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.files = files
	c.next()
}

// SwitchOff says who is switched off besides the files, by identity.PrincipalKey and
// with the reason: these, and no others.
func (c *Current) SwitchOff(off map[string]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if maps.Equal(c.off, off) {
		return
	}
	c.off = maps.Clone(off)
	c.next()
}

func (c *Current) next() {
	c.set.Store(c.files.Without(c.off))
	close(c.changed)
	c.changed = make(chan struct{})
}
