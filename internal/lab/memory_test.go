package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
)

// memoryMarker, in a kmed's environment, is what the search of its memory has to find.
const memoryMarker = "KME_MARKER"

// planted is a marker in the forms that are sought, for a process's environment, and what
// it is.
func planted() (variable string, marker []byte) {
	for marker = make([]byte, key.AtomBytes); bytes.IndexByte(marker, 0) >= 0; { // which ends a variable
		_, _ = rand.Read(marker)
	}
	return fmt.Sprintf("%s=%s %x %s", memoryMarker, marker, marker, base64.StdEncoding.EncodeToString(marker)), marker
}

// notInMemory has keys delivered, and looks for them and for the PIN in the memory of both
// kmeds once their clients have gone: nothing of them is left, while the peers and an
// operator go on using what the HTTP servers of a process share.
func notInMemory(t *testing.T, l *Lab, marker []byte) {
	keysStored(t, l, 300)
	onlyInFlight(t, l, marker)
	keysStored(t, l, 300)
	var s search
	deliver(t, l, &s) // over HTTP/1.1
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	for _, p := range []*Person{alice, bob} {
		p.HTTP.Transport.(*http.Transport).ForceAttemptHTTP2 = true
	}
	taken := get(t, alice, bob, 60)
	take(t, bob, alice, taken)
	for _, secret := range taken {
		s.add("a key delivered over HTTP/2", secret)
	}
	for _, p := range []*Person{alice, bob} {
		p.HTTP.CloseIdleConnections()
	}
	gone := time.Now()
	delivered := len(s.secrets)
	s.add("marker", marker)
	sites := []*Site{l.KM1, l.KM2}
	for _, site := range sites {
		pin, err := os.ReadFile(site.path("hsm", "pin"))
		if err != nil {
			t.Fatal(err)
		}
		s.add("the PIN", bytes.TrimSpace(pin))
	}

	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	defer func() { stop(); asking.Wait() }()
	for _, site := range sites {
		op := operator(t, site)
		asking.Go(func() {
			for ctx.Err() == nil {
				_, _ = op.Alarms(ctx) // whatever it answers
				select {
				case <-time.After(150 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
	}

	for _, site := range sites {
		late := time.After(time.Minute)
		for {
			found, size, err := s.inProcess(site.kmed.cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			left := make(map[[2]string]int) // by what and form
			for _, f := range found {
				left[[2]string{f.what, f.form}]++
				if f.what != "marker" && f.form == "bytes" { // not in a buffer of HTTP
					t.Logf("%s as bytes at %#x, in %s", f.what, f.offset, f.file)
				}
			}
			for _, form := range []string{"bytes", "hex", "base64"} {
				if left[[2]string{"marker", form}] == 0 {
					t.Fatalf("the search does not find the marker as %s in the memory of %s", form, site.Name)
				}
				delete(left, [2]string{"marker", form})
			}
			t.Logf("%s, %.1f s after the last connection: of %d keys, found %v in %d MB", site.Name, time.Since(gone).Seconds(), delivered, left, size>>20)
			if len(left) == 0 {
				break
			}
			select {
			case <-time.After(time.Second):
				continue
			case <-late:
			}
			for _, f := range found {
				if f.what != "marker" {
					t.Errorf("%s as %s in %s at %#x", f.what, f.form, f.file, f.offset)
				}
			}
			break
		}
	}
}

// rounds are those of a pair of SAEs of which one asks for keys and the other takes them,
// round after round, each over a connection that stays open.
type rounds struct {
	mu   sync.Mutex
	keys []keySet // of each round whose master has been answered
	over int      // how many rounds are over: of any that follows, keys are in flight
}

// run goes on until ctx ends. A request that is refused is no round.
func (r *rounds) run(ctx context.Context, master, slave *Person) {
	defer master.HTTP.CloseIdleConnections()
	defer slave.HTTP.CloseIdleConnections()
	for {
		got, err := master.Client.EncKeys(ctx, slave.ID, etsi014.KeyRequest{Number: 1 + mathrand.IntN(5)})
		if err == nil {
			keys := make(keySet)
			keys.add(got)
			r.mu.Lock()
			r.keys = append(r.keys, keys)
			r.mu.Unlock()
			taken, _ := slave.Client.DecKeys(ctx, master.ID, keys.ids()) // they may not be there any more
			taken.Wipe()
			r.mu.Lock()
			r.over = len(r.keys)
			r.mu.Unlock()
		}
		select {
		case <-time.After(30 * time.Millisecond): // the light makes some hundred keys a second
		case <-ctx.Done():
			return
		}
	}
}

// state is how many rounds are over, and how many masters were answered.
func (r *rounds) state() (over, answered int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.over, len(r.keys)
}

// onlyInFlight has pairs of SAEs go on and on, half of them over HTTP/2, and looks into the memory of both kmeds
// meanwhile, as a core image would show it at one moment: of all the keys that were handed
// out only those are there whose answer is on its way, or was the last on its connection.
// What the collector has not overwritten yet goes within seconds.
func onlyInFlight(t *testing.T, l *Lab, marker []byte) {
	const pairs = 4
	ctx, stop := context.WithCancel(t.Context())
	var going sync.WaitGroup
	defer func() { stop(); going.Wait() }()
	all := make([]rounds, pairs)
	for i := range all {
		master, slave := sae(t, l, "alice"), sae(t, l, "bob")
		if i%2 == 1 {
			master, slave = slave, master
		}
		for _, p := range []*Person{master, slave} {
			p.HTTP.Transport.(*http.Transport).ForceAttemptHTTP2 = i >= pairs/2
		}
		going.Go(func() { all[i].run(ctx, master, slave) })
	}
	more := func(n int) {
		t.Helper()
		var want [pairs]int
		for i := range all {
			_, answered := all[i].state()
			want[i] = answered + n
		}
		eventually(t, "keys of every pair", func(context.Context) error {
			for i := range all {
				if _, answered := all[i].state(); answered < want[i] {
					return fmt.Errorf("pair %d had %d answers, want %d", i, answered, want[i])
				}
			}
			return nil
		})
	}
	more(20)
	for _, site := range []*Site{l.KM1, l.KM2} {
		eventually(t, "no key in the memory of "+site.Name+" but those in flight", func(context.Context) error {
			var over [pairs]int
			for i := range all {
				over[i], _ = all[i].state()
			}
			core, err := coreOf(site.kmed.cmd.Process.Pid)
			if err != nil {
				return err
			}
			more(2) // so that those are known that were in flight
			var s search
			s.add("marker", marker)
			delivered := 0
			for i := range all {
				all[i].mu.Lock()
				for n, keys := range all[i].keys {
					for _, secret := range keys {
						what := "the key of an earlier answer"
						if n >= over[i]-1 {
							what = fmt.Sprintf("a key in flight, of round %d of pair %d (%d were over)", n, i, over[i])
						}
						s.add(what, secret)
						delivered++
					}
				}
				all[i].mu.Unlock()
			}
			found := make(map[string]int)
			var old []finding
			for _, c := range core {
				for _, f := range s.pages(c.where, c.bytes, c.at) {
					found[f.what+", as "+f.form]++
					if f.what == "the key of an earlier answer" {
						old = append(old, f)
					}
				}
			}
			for _, form := range []string{"bytes", "hex", "base64"} {
				if found["marker, as "+form] == 0 {
					t.Fatalf("the search does not find the marker as %s in the memory of %s", form, site.Name)
				}
				delete(found, "marker, as "+form)
			}
			t.Logf("%s under load, of %d keys: %v", site.Name, delivered, found)
			if len(old) > 0 {
				return fmt.Errorf("of earlier answers: %v", old)
			}
			return nil
		})
	}
}

// mapped is a part of a process's memory.
type mapped struct {
	where string
	at    int64
	bytes []byte // what begins in it, and goes on beyond, included
}

// coreOf is what a process that was built for tests has in memory at one moment, for which
// it is stopped.
func coreOf(pid int) (core []mapped, err error) {
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return nil, err
	}
	defer syscall.Kill(pid, syscall.SIGCONT)
	_, err = memoryOf(pid, func(where string, chunk []byte, at int64) {
		if len(bytes.TrimLeft(chunk, "\x00")) > 0 {
			core = append(core, mapped{where, at, bytes.Clone(chunk)})
		}
	})
	return core, err
}

const (
	memoryPage  = 4096
	memoryChunk = 16 << 20
	longest     = 64 // bytes, of a pattern
)

// inProcess searches the memory of a process, a kmed that was built for tests or any if we
// are root, and says how many bytes it has read.
func (s *search) inProcess(pid int) (found []finding, size int64, err error) {
	size, err = memoryOf(pid, func(where string, chunk []byte, at int64) {
		found = append(found, s.pages(where, chunk, at)...)
	})
	return found, size, err
}

// memoryOf reads what a process may write to, chunk by chunk, and says how many bytes that
// are. A chunk has what begins in it and goes on beyond.
func memoryOf(pid int, each func(where string, chunk []byte, at int64)) (size int64, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return 0, err
	}
	defer mem.Close()
	buf := make([]byte, memoryChunk+longest)
	for line := range strings.Lines(string(maps)) {
		var first, end uint64
		var may string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &first, &end, &may); err != nil {
			return 0, fmt.Errorf("reading %q: %w", line, err)
		}
		if !strings.HasPrefix(may, "rw") { // nobody can have written there
			continue
		}
		where := strings.TrimSpace(line)
		for at := int64(first); at < int64(end); at += memoryChunk {
			n, err := mem.ReadAt(buf[:min(memoryChunk+longest, int64(end)-at)], at)
			if err != nil && !errors.Is(err, syscall.EIO) { // that: it is not mapped any more
				return 0, err
			}
			size += int64(min(n, memoryChunk))
			each(where, buf[:n], at)
		}
	}
	return size, nil
}

// pages searches the pages of a chunk that lies at an address, without those that are
// empty, which most are. What begins beyond the chunk is the next one's.
func (s *search) pages(where string, chunk []byte, address int64) (found []finding) {
	var empty [memoryPage]byte
	for at := 0; at < min(len(chunk), memoryChunk); at += memoryPage {
		page := chunk[at:min(at+memoryPage, len(chunk))]
		if bytes.Equal(page, empty[:len(page)]) {
			continue
		}
		for _, f := range s.text(where, chunk[at:min(at+memoryPage+longest, len(chunk))]) {
			if f.offset < memoryPage {
				f.offset += at + int(address)
				found = append(found, f)
			}
		}
	}
	return found
}

// The search finds a secret wherever it lies in memory: over the ends of pages too.
func TestSearchInMemory(t *testing.T) {
	t.Parallel()
	var s search
	secret := make([]byte, key.AtomBytes)
	_, _ = rand.Read(secret)
	s.add("secret", secret)
	for _, at := range []int{0, 1, memoryPage - 20, memoryPage - 1, memoryPage, 3*memoryPage - len(secret)} {
		chunk := make([]byte, 3*memoryPage)
		copy(chunk[at:], secret)
		found := s.pages("chunk", chunk, 1<<40)
		if len(found) != 2 || found[0].offset != 1<<40+at || found[1].offset != 1<<40+at+16 {
			t.Errorf("at %d: found %v", at, found)
		}
	}
	found, size, err := s.inProcess(os.Getpid()) // which has what it looks for
	if err != nil || size == 0 || len(found) == 0 {
		t.Errorf("in this process: found %v in %d bytes, %v", found, size, err)
	}
}
