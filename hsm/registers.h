// What a module leaves in the vector registers when it has copied a key. Go's runtime saves
// all of them when it preempts a goroutine that has come back from here, in memory that it
// neither frees nor overwrites (runtime/preempt_xreg.go): a key was found there minutes
// after it had been handed out.
#pragma once

#if defined(__x86_64__)
#define CLEAR512(n) "vpxorq %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
// forget clears the vector registers that a function may change.
__attribute__((noinline)) static void forget(void) {
	if (!__builtin_cpu_supports("avx")) {
		__asm__ volatile(
			"pxor %%xmm0, %%xmm0\n\tpxor %%xmm1, %%xmm1\n\tpxor %%xmm2, %%xmm2\n\tpxor %%xmm3, %%xmm3\n\t"
			"pxor %%xmm4, %%xmm4\n\tpxor %%xmm5, %%xmm5\n\tpxor %%xmm6, %%xmm6\n\tpxor %%xmm7, %%xmm7\n\t"
			"pxor %%xmm8, %%xmm8\n\tpxor %%xmm9, %%xmm9\n\tpxor %%xmm10, %%xmm10\n\tpxor %%xmm11, %%xmm11\n\t"
			"pxor %%xmm12, %%xmm12\n\tpxor %%xmm13, %%xmm13\n\tpxor %%xmm14, %%xmm14\n\tpxor %%xmm15, %%xmm15"
			: : : "memory");
		return;
	}
	if (__builtin_cpu_supports("avx512f"))
		__asm__ volatile(
			CLEAR512(16) CLEAR512(17) CLEAR512(18) CLEAR512(19) CLEAR512(20) CLEAR512(21) CLEAR512(22) CLEAR512(23)
			CLEAR512(24) CLEAR512(25) CLEAR512(26) CLEAR512(27) CLEAR512(28) CLEAR512(29) CLEAR512(30) CLEAR512(31)
			: : : "memory");
	__asm__ volatile("vzeroall" : : : "memory"); // 0 to 15, and the next one's SSE is not slowed down
}
#elif defined(__aarch64__)
#define CLEAR(n) "movi v" #n ".2d, #0\n\t"
// forget clears the vector registers that a function may change.
__attribute__((noinline)) static void forget(void) {
	__asm__ volatile(
		CLEAR(0) CLEAR(1) CLEAR(2) CLEAR(3) CLEAR(4) CLEAR(5) CLEAR(6) CLEAR(7)
		CLEAR(16) CLEAR(17) CLEAR(18) CLEAR(19) CLEAR(20) CLEAR(21) CLEAR(22) CLEAR(23)
		CLEAR(24) CLEAR(25) CLEAR(26) CLEAR(27) CLEAR(28) CLEAR(29) CLEAR(30) CLEAR(31)
		: : : "memory");
}
#else
static void forget(void) {}
#endif
