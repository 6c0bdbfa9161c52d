// Package hsmtest makes an HSM misbehave. Its Module stands between a process and a
// real PKCS#11 module, passes every call on, and fails, holds up or counts the calls
// that a test names, while the process runs: the test's own, or a kmed that knows
// nothing of it. It is for tests.
package hsmtest

import (
	_ "embed"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// Function is a place in CK_FUNCTION_LIST.
type Function int

// The functions that a Module watches.
const (
	Initialize        Function = 0
	Finalize          Function = 1
	GetSlotList       Function = 4
	GetTokenInfo      Function = 6
	OpenSession       Function = 12
	CloseSession      Function = 13
	CloseAllSessions  Function = 14
	GetSessionInfo    Function = 15
	Login             Function = 18
	CreateObject      Function = 20
	CopyObject        Function = 21
	DestroyObject     Function = 22
	GetAttributeValue Function = 24
	FindObjectsInit   Function = 26
	EncryptInit       Function = 29
	Encrypt           Function = 30
	DecryptInit       Function = 33
	Decrypt           Function = 34
	GenerateKey       Function = 58
	GenerateRandom    Function = 64

	functions = 68
)

// Always is a number of calls that no test comes to the end of.
const Always = 1 << 30

//go:embed testdata/fault.c
var source []byte

// control is struct control of testdata/fault.c: unsigned longs.
type control struct{ rv, left, after, late, hold, latency, limit, mark, calls, inside, most uintptr }

// Module is a module that misbehaves when told. The process that loads Path needs Env
// in its environment when it does.
type Module struct {
	Path string   // of the PKCS#11 library
	Env  []string // name=value
	mem  []byte
	at   *[functions]control
}

// New builds a module in dir, with the C compiler CC, that passes on to the one at
// behind.
func New(dir, behind string) (*Module, error) {
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "cc"
	}
	c, ctl := filepath.Join(dir, "fault.c"), filepath.Join(dir, "fault.ctl")
	m := &Module{Path: filepath.Join(dir, "fault.so"), Env: []string{"P11FAULT_MODULE=" + behind, "P11FAULT_CTL=" + ctl}}
	if err := os.WriteFile(c, source, 0o600); err != nil {
		return nil, err
	}
	if out, err := exec.Command(cc, "-O1", "-shared", "-fPIC", "-o", m.Path, c, "-ldl").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the fault module: %w\n%s", err, out)
	}
	f, err := os.Create(ctl)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size := int(unsafe.Sizeof([functions]control{}))
	if err := f.Truncate(int64(size)); err != nil {
		return nil, err
	}
	if m.mem, err = syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED); err != nil {
		return nil, err
	}
	m.at = (*[functions]control)(unsafe.Pointer(unsafe.SliceData(m.mem)))
	return m, nil
}

// Close lets the controls go: the module then stays as it was told last.
func (m *Module) Close() error { return syscall.Munmap(m.mem) }

// Fail has the next times calls of f answer rv instead of being passed on.
func (m *Module) Fail(f Function, rv uint, times int) { m.fail(f, rv, 0, times, 0) }

// FailAfter lets after calls pass before those that fail.
func (m *Module) FailAfter(f Function, after int, rv uint, times int) { m.fail(f, rv, after, times, 0) }

// FailLate has calls answer rv after the real module has done its part.
func (m *Module) FailLate(f Function, rv uint, times int) { m.fail(f, rv, 0, times, 1) }

func (m *Module) fail(f Function, rv uint, after, times int, late uintptr) {
	k := &m.at[f]
	atomic.StoreUintptr(&k.left, 0)
	atomic.StoreUintptr(&k.rv, uintptr(rv))
	atomic.StoreUintptr(&k.late, late)
	atomic.StoreUintptr(&k.after, uintptr(after))
	atomic.StoreUintptr(&k.left, uintptr(times))
}

// Slow has each call of f take so much longer.
func (m *Module) Slow(f Function, by time.Duration) {
	atomic.StoreUintptr(&m.at[f].latency, uintptr(by.Microseconds()))
}

// Hold keeps calls of f in the module until it is told otherwise.
func (m *Module) Hold(f Function, hold bool) {
	v := uintptr(0)
	if hold {
		v = 1
	}
	atomic.StoreUintptr(&m.at[f].hold, v)
}

// MaxSessions has C_OpenSession answer CKR_SESSION_COUNT when so many are open. 0 is no limit.
func (m *Module) MaxSessions(n int) { atomic.StoreUintptr(&m.at[OpenSession].limit, uintptr(n)) }

// Mark has each call of f leave the pattern, again and again, in the processor's vector
// registers when it returns.
func (m *Module) Mark(f Function, pattern [8]byte) {
	atomic.StoreUintptr(&m.at[f].mark, uintptr(binary.NativeEndian.Uint64(pattern[:])))
}

// Heal ends all trouble.
func (m *Module) Heal() {
	for f := range m.at {
		k := &m.at[f]
		for _, p := range []*uintptr{&k.left, &k.after, &k.late, &k.hold, &k.latency, &k.limit, &k.mark} {
			atomic.StoreUintptr(p, 0)
		}
	}
}

// Calls is how often f was called, Inside how many calls of it are in the module, and
// Most how many there were at most.
func (m *Module) Calls(f Function) int { return int(atomic.LoadUintptr(&m.at[f].calls)) }

// Inside: see Calls.
func (m *Module) Inside(f Function) int { return int(atomic.LoadUintptr(&m.at[f].inside)) }

// Most: see Calls.
func (m *Module) Most(f Function) int { return int(atomic.LoadUintptr(&m.at[f].most)) }
