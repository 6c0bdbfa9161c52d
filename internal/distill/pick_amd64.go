//go:build !purego

package distill

import "golang.org/x/sys/cpu"

// hasPick says that there are instructions for pick. Some processors take a time for them
// that depends on the mask, which is public.
var hasPick = cpu.X86.HasBMI2 && cpu.X86.HasPOPCNT

// pickAsm moves the bits of a column of words at which mask has one side by side to picked,
// of which it sets one word more than they take.
//
//go:noescape
func pickAsm(picked, column, mask *uint64, words int)
