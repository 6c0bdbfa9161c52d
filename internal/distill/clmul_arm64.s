//go:build !purego

#include "textflag.h"

// func productAsm(x, y uint64) (hi, lo uint64)
TEXT ·productAsm(SB), NOSPLIT, $0-32
	FMOVD  x+0(FP), F0
	FMOVD  y+8(FP), F1
	VPMULL V0.D1, V1.D1, V2.Q1
	VMOV   V2.D[0], R0
	VMOV   V2.D[1], R1
	MOVD   R0, lo+24(FP)
	MOVD   R1, hi+16(FP)
	RET

// COLUMN sets V8 to the sum of the products s[a] x[b] with a+b = w, where R1 points to
// s[w-7]. V0 to V3 hold x, two words each, the later one first.
#define COLUMN \
	VLD1    (R1), [V4.D2, V5.D2, V6.D2, V7.D2]; \
	ADD     $8, R1; \
	VPMULL  V7.D1, V0.D1, V8.Q1; \
	VPMULL2 V7.D2, V0.D2, V9.Q1; \
	VPMULL  V6.D1, V1.D1, V10.Q1; \
	VPMULL2 V6.D2, V1.D2, V11.Q1; \
	VPMULL  V5.D1, V2.D1, V12.Q1; \
	VPMULL2 V5.D2, V2.D2, V13.Q1; \
	VPMULL  V4.D1, V3.D1, V14.Q1; \
	VPMULL2 V4.D2, V3.D2, V15.Q1; \
	VEOR    V9.B16, V8.B16, V8.B16; \
	VEOR    V11.B16, V10.B16, V10.B16; \
	VEOR    V13.B16, V12.B16, V12.B16; \
	VEOR    V15.B16, V14.B16, V14.B16; \
	VEOR    V10.B16, V8.B16, V8.B16; \
	VEOR    V14.B16, V12.B16, V12.B16; \
	VEOR    V12.B16, V8.B16, V8.B16

// WORD stores the next word: the upper half of the column before, in R3, plus the lower
// half of this one, whose upper half takes its place.
#define WORD \
	VMOV   V8.D[0], R4; \
	EOR    R3, R4, R4; \
	MOVD.P R4, 8(R0); \
	VMOV   V8.D[1], R3

// func kernelAsm(out *[8]uint64, s *[16]uint64, x *[8]uint64)
TEXT ·kernelAsm(SB), NOSPLIT, $0-24
	MOVD out+0(FP), R0
	MOVD s+8(FP), R1
	MOVD x+16(FP), R2
	VLD1 (R2), [V0.D2, V1.D2, V2.D2, V3.D2]
	VEXT $8, V0.B16, V0.B16, V0.B16
	VEXT $8, V1.B16, V1.B16, V1.B16
	VEXT $8, V2.B16, V2.B16, V2.B16
	VEXT $8, V3.B16, V3.B16, V3.B16
	COLUMN
	VMOV V8.D[1], R3
	COLUMN
	WORD
	COLUMN
	WORD
	COLUMN
	WORD
	COLUMN
	WORD
	COLUMN
	WORD
	COLUMN
	WORD
	COLUMN
	WORD
	COLUMN
	WORD
	RET
