//go:build !amd64 || purego

package distill

const hasPick = false

func pickAsm(_, _, _ *uint64, _ int) { panic("not here") }
