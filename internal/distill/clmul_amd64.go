//go:build !purego

package distill

import "golang.org/x/sys/cpu"

var hasProduct = cpu.X86.HasPCLMULQDQ
