//go:build !purego

#include "textflag.h"

// func pickAsm(picked, column, mask *uint64, words int)
//
// R8 holds the word that is being filled, and CX how many bits of it are.
TEXT ·pickAsm(SB), NOSPLIT, $0-32
	MOVQ picked+0(FP), DI
	MOVQ column+8(FP), SI
	MOVQ mask+16(FP), DX
	MOVQ words+24(FP), BX
	XORL R8, R8
	XORL CX, CX

loop:
	MOVQ    (DX), AX
	MOVQ    (SI), R9
	PEXTQ   AX, R9, R9
	POPCNTQ AX, AX
	SHLXQ   CX, R9, R10
	ORQ     R10, R8
	MOVQ    R8, (DI)
	MOVQ    CX, R11
	NOTQ    R11
	SHRQ    $1, R9
	SHRXQ   R11, R9, R9      // what does not fit: the bits from 64-CX on
	ADDQ    AX, CX
	CMPQ    CX, $64
	CMOVQCC R9, R8
	MOVQ    CX, AX
	SHRQ    $6, AX
	LEAQ    (DI)(AX*8), DI
	ANDQ    $63, CX
	ADDQ    $8, SI
	ADDQ    $8, DX
	DECQ    BX
	JNZ     loop
	MOVQ    R8, (DI)
	RET
