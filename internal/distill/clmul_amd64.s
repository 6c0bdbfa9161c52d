//go:build !purego

#include "textflag.h"

// func productAsm(x, y uint64) (hi, lo uint64)
TEXT ·productAsm(SB), NOSPLIT, $0-32
	MOVQ      x+0(FP), X0
	MOVQ      y+8(FP), X1
	PCLMULQDQ $0x00, X1, X0
	MOVQ      X0, lo+24(FP)
	PSRLO     $8, X0
	MOVQ      X0, hi+16(FP)
	RET

// COLUMN sets X8 to the sum of the products s[a] x[b] with a+b = w, where AT is 8(w-1).
// X0 to X3 hold x, two words each; each pair of s is multiplied crosswise.
#define COLUMN(AT) \
	MOVOU     (AT)(SI), X4; \
	MOVOU     (AT-16)(SI), X5; \
	MOVOU     (AT-32)(SI), X6; \
	MOVOU     (AT-48)(SI), X7; \
	MOVOU     X4, X8; \
	MOVOU     X5, X9; \
	MOVOU     X6, X10; \
	MOVOU     X7, X11; \
	PCLMULQDQ $0x01, X0, X8; \
	PCLMULQDQ $0x10, X0, X4; \
	PCLMULQDQ $0x01, X1, X9; \
	PCLMULQDQ $0x10, X1, X5; \
	PCLMULQDQ $0x01, X2, X10; \
	PCLMULQDQ $0x10, X2, X6; \
	PCLMULQDQ $0x01, X3, X11; \
	PCLMULQDQ $0x10, X3, X7; \
	PXOR      X4, X8; \
	PXOR      X9, X5; \
	PXOR      X10, X6; \
	PXOR      X11, X7; \
	PXOR      X5, X8; \
	PXOR      X7, X6; \
	PXOR      X6, X8

// WORD stores word K: the upper half of the column before, in X12, plus the lower half
// of this one, which takes its place.
#define WORD(K) \
	PSRLO $8, X12; \
	PXOR  X8, X12; \
	MOVQ  X12, (8*K)(DI); \
	MOVOU X8, X12

// func kernelAsm(out *[8]uint64, s *[16]uint64, x *[8]uint64)
TEXT ·kernelAsm(SB), NOSPLIT, $0-24
	MOVQ  out+0(FP), DI
	MOVQ  s+8(FP), SI
	MOVQ  x+16(FP), DX
	MOVOU (DX), X0
	MOVOU 16(DX), X1
	MOVOU 32(DX), X2
	MOVOU 48(DX), X3
	COLUMN(48)
	MOVOU X8, X12
	COLUMN(56)
	WORD(0)
	COLUMN(64)
	WORD(1)
	COLUMN(72)
	WORD(2)
	COLUMN(80)
	WORD(3)
	COLUMN(88)
	WORD(4)
	COLUMN(96)
	WORD(5)
	COLUMN(104)
	WORD(6)
	COLUMN(112)
	WORD(7)
	RET

// func kernelWide(out *[8]uint64, s *[16]uint64, x *[8]uint64)
//
// Z4 and Z5 get the sums of the products s[a] x[b] with a+b = 8, 10, 12, 14 and 9, 11, 13,
// 15: for each b, of the eight words of s from 8-b on by x[b]. Z6 gets that with a+b = 7,
// of which the upper half counts. The answer is Z4, and one word higher Z5 behind Z6.
TEXT ·kernelWide(SB), NOSPLIT, $0-24
	MOVQ       out+0(FP), DI
	MOVQ       s+8(FP), SI
	MOVQ       x+16(FP), DX
	VMOVDQU64  (DX), Z0
	VSHUFI64X2 $0x1b, Z0, Z0, Z0
	VMOVDQU64  (SI), Z1
	VPCLMULQDQ $0x01, Z0, Z1, Z6
	VPCLMULQDQ $0x10, Z0, Z1, Z7
	VPXORQ     Z7, Z6, Z6
	VPXORQ     Z4, Z4, Z4
	VPXORQ     Z5, Z5, Z5

#define BY(B) \
	VMOVDQU64    (64-8*B)(SI), Z1; \
	VPBROADCASTQ (8*B)(DX), Z0; \
	VPCLMULQDQ   $0x00, Z0, Z1, Z2; \
	VPCLMULQDQ   $0x01, Z0, Z1, Z3; \
	VPXORQ       Z2, Z4, Z4; \
	VPXORQ       Z3, Z5, Z5

	BY(0)
	BY(1)
	BY(2)
	BY(3)
	BY(4)
	BY(5)
	BY(6)
	BY(7)
	VSHUFI64X2 $0x4e, Z6, Z6, Z7
	VPXORQ     Z7, Z6, Z6
	VSHUFI64X2 $0xb1, Z6, Z6, Z7
	VPXORQ     Z7, Z6, Z6
	VALIGNQ    $7, Z6, Z5, Z5
	VPXORQ     Z5, Z4, Z4
	VMOVDQU64  Z4, (DI)
	VZEROUPPER
	RET

// func kernelTwice(out, s, x *uint64)
//
// As kernelWide: Z4 and Z5 get the sums with a+b = 16, 18, 20, 22 and 17, 19, 21, 23, Z8 and
// Z9 those with 24 and on, and Z6 that with a+b = 15.
TEXT ·kernelTwice(SB), NOSPLIT, $0-24
	MOVQ       out+0(FP), DI
	MOVQ       s+8(FP), SI
	MOVQ       x+16(FP), DX
	VMOVDQU64  (DX), Z0
	VMOVDQU64  64(DX), Z2
	VSHUFI64X2 $0x1b, Z0, Z0, Z0
	VSHUFI64X2 $0x1b, Z2, Z2, Z2
	VMOVDQU64  (SI), Z1
	VMOVDQU64  64(SI), Z3
	VPCLMULQDQ $0x01, Z2, Z1, Z6
	VPCLMULQDQ $0x10, Z2, Z1, Z7
	VPXORQ     Z7, Z6, Z6
	VPCLMULQDQ $0x01, Z0, Z3, Z7
	VPXORQ     Z7, Z6, Z6
	VPCLMULQDQ $0x10, Z0, Z3, Z7
	VPXORQ     Z7, Z6, Z6
	VPXORQ     Z4, Z4, Z4
	VPXORQ     Z5, Z5, Z5
	VPXORQ     Z8, Z8, Z8
	VPXORQ     Z9, Z9, Z9

#define BY2(B) \
	VPBROADCASTQ (8*B)(DX), Z0; \
	VMOVDQU64    (128-8*B)(SI), Z1; \
	VMOVDQU64    (192-8*B)(SI), Z10; \
	VPCLMULQDQ   $0x00, Z0, Z1, Z2; \
	VPCLMULQDQ   $0x01, Z0, Z1, Z3; \
	VPCLMULQDQ   $0x00, Z0, Z10, Z11; \
	VPCLMULQDQ   $0x01, Z0, Z10, Z12; \
	VPXORQ       Z2, Z4, Z4; \
	VPXORQ       Z3, Z5, Z5; \
	VPXORQ       Z11, Z8, Z8; \
	VPXORQ       Z12, Z9, Z9

	BY2(0)
	BY2(1)
	BY2(2)
	BY2(3)
	BY2(4)
	BY2(5)
	BY2(6)
	BY2(7)
	BY2(8)
	BY2(9)
	BY2(10)
	BY2(11)
	BY2(12)
	BY2(13)
	BY2(14)
	BY2(15)
	VSHUFI64X2 $0x4e, Z6, Z6, Z7
	VPXORQ     Z7, Z6, Z6
	VSHUFI64X2 $0xb1, Z6, Z6, Z7
	VPXORQ     Z7, Z6, Z6
	VALIGNQ    $7, Z5, Z9, Z9
	VALIGNQ    $7, Z6, Z5, Z5
	VPXORQ     Z5, Z4, Z4
	VPXORQ     Z9, Z8, Z8
	VMOVDQU64  Z4, (DI)
	VMOVDQU64  Z8, 64(DI)
	VZEROUPPER
	RET

// func xorWide(dst, a, b *uint64, eights int)
TEXT ·xorWide(SB), NOSPLIT, $0-32
	MOVQ dst+0(FP), DI
	MOVQ a+8(FP), SI
	MOVQ b+16(FP), DX
	MOVQ eights+24(FP), CX

loop:
	VMOVDQU64 (SI), Z0
	VPXORQ    (DX), Z0, Z0
	VMOVDQU64 Z0, (DI)
	ADDQ      $64, SI
	ADDQ      $64, DX
	ADDQ      $64, DI
	DECQ      CX
	JNZ       loop
	VZEROUPPER
	RET

// func addFoursAsm(sum *element, powers *[4]element, coefficients *byte, fours int)
//
// X4, X5 and X6 get the low, middle and high parts of the sum of four products. What lies
// beyond z^127 comes back as its multiple by z^7+z^2+z+1 (X12), the highest 64 bits first.
TEXT ·addFoursAsm(SB), NOSPLIT, $0-32
	MOVQ  sum+0(FP), DI
	MOVQ  powers+8(FP), DX
	MOVQ  coefficients+16(FP), SI
	MOVQ  fours+24(FP), CX
	MOVOU (DI), X0
	MOVOU (DX), X11
	MOVOU 16(DX), X10
	MOVOU 32(DX), X9
	MOVOU 48(DX), X8
	MOVQ  $0x87, AX
	MOVQ  AX, X12

#define TIMES(POWER) \
	MOVO      X1, X2; \
	MOVO      X1, X3; \
	MOVO      X1, X7; \
	PCLMULQDQ $0x00, POWER, X2; \
	PCLMULQDQ $0x11, POWER, X3; \
	PCLMULQDQ $0x01, POWER, X7; \
	PCLMULQDQ $0x10, POWER, X1; \
	PXOR      X2, X4; \
	PXOR      X3, X6; \
	PXOR      X7, X5; \
	PXOR      X1, X5

four:
	PXOR  X4, X4
	PXOR  X5, X5
	PXOR  X6, X6
	MOVOU 16(SI), X1
	TIMES(X9)
	MOVOU 32(SI), X1
	TIMES(X10)
	MOVOU 48(SI), X1
	TIMES(X11)
	MOVOU (SI), X1
	PXOR  X0, X1
	TIMES(X8)

	MOVO  X5, X7
	PSLLO $8, X7
	PSRLO $8, X5
	PXOR  X7, X4
	PXOR  X5, X6

	MOVO      X6, X7
	PCLMULQDQ $0x01, X12, X7
	MOVO      X7, X5
	PSLLO     $8, X5
	PSRLO     $8, X7
	PXOR      X5, X4
	PXOR      X7, X6
	PCLMULQDQ $0x00, X12, X6
	PXOR      X6, X4
	MOVO      X4, X0

	ADDQ  $64, SI
	DECQ  CX
	JNZ   four
	MOVOU X0, (DI)
	RET
