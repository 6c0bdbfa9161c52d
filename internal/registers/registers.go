//go:build amd64 || arm64

// Package registers clears the processor's vector registers, which whoever copies 16 bytes
// or more leaves them in. Go's runtime saves all of them when it preempts a goroutine, any
// that runs next on the thread, in memory that it neither frees nor overwrites
// (runtime/preempt_xreg.go); the kernel does so with each signal, on the thread's signal
// stack. Whoever has copied a key clears them before it waits for anything.
package registers

// Clear clears the vector registers of this thread that Go's own code uses.
func Clear() { clearAll() }

// File is room for all vector registers: none is longer than 64 bytes, and there are no more.
type File [32 * 64]byte

// Peek reads the vector registers of this thread, for tests.
func (f *File) Peek() { peek(&f[0]) }
