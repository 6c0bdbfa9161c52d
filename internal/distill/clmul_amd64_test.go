//go:build !purego

package distill

func init() {
	if hasProduct {
		kernels["kernelAsm"] = kernelAsm // also where there is a faster one
	}
}
