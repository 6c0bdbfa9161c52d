package registers

import "golang.org/x/sys/cpu"

func clearSSE()
func clearAVX()
func peekSSE(to *byte)
func peekAVX(to *byte)
func peekAVX512(to *byte)

func clearAll() {
	if cpu.X86.HasAVX {
		clearAVX()
	} else {
		clearSSE()
	}
}

// peek reads as wide and as many registers as there are.
func peek(to *byte) {
	switch {
	case cpu.X86.HasAVX512F:
		peekAVX512(to)
	case cpu.X86.HasAVX:
		peekAVX(to)
	default:
		peekSSE(to)
	}
}
