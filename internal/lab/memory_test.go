package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

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

const (
	memoryPage  = 4096
	memoryChunk = 16 << 20
	longest     = 64 // bytes, of a pattern
)

// inProcess searches the memory of a process, a kmed that was built for tests or any if we
// are root, and says how many bytes it has read.
func (s *search) inProcess(pid int) (found []finding, size int64, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, 0, err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, 0, err
	}
	defer mem.Close()
	buf := make([]byte, memoryChunk+longest)
	for line := range strings.Lines(string(maps)) {
		var first, end uint64
		var may string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &first, &end, &may); err != nil {
			return nil, 0, fmt.Errorf("reading %q: %w", line, err)
		}
		if !strings.HasPrefix(may, "rw") { // nobody can have written there
			continue
		}
		where := strings.TrimSpace(line)
		for at := int64(first); at < int64(end); at += memoryChunk {
			n, err := mem.ReadAt(buf[:min(memoryChunk+longest, int64(end)-at)], at)
			if err != nil && !errors.Is(err, syscall.EIO) { // that: it is not mapped any more
				return nil, 0, err
			}
			size += int64(min(n, memoryChunk))
			found = append(found, s.pages(where, buf[:n], at)...)
		}
	}
	return found, size, nil
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
