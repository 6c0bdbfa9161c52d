// A PKCS#11 module that passes every call on to another one and, where told, counts
// it, holds it up or answers with an error of its own: instead of passing it on, or
// after having done so (late).
//
// P11FAULT_MODULE names the module behind it. P11FAULT_CTL names a file of one
// struct control for each function, which a test maps and changes while we run
// (package hsmtest).
//
// Every function that is watched takes at most six arguments, each the size of a
// pointer or smaller, so one shape serves for all on the ABIs we test on.
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

typedef unsigned long num;
typedef num any_fn(num, num, num, num, num, num);

enum { FUNCTIONS = 68, FINALIZE = 1, OPEN_SESSION = 12, CLOSE_SESSION = 13, CLOSE_ALL_SESSIONS = 14, SESSION_COUNT = 0xB1 };
struct control { num rv, left, after, late, hold, latency, limit, mark, calls, inside, most; };
struct functions { unsigned char version[2]; any_fn *at[FUNCTIONS]; };

static struct functions *real, ours;
static struct control *ctl;
static num sessions; // open ones

#define GET(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
#define SET(p, v) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)
#define ADD(p, v) __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST)

// one takes one of *left, if there is one.
static int one(num *left) {
	num n = GET(left);
	while (n > 0 && !__atomic_compare_exchange_n(left, &n, n - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
	return n > 0;
}

// mark leaves a pattern in all vector registers that a function may change.
static void mark(num with) {
#if defined(__x86_64__)
#define COPY(n) "movdqa %%xmm0, %%xmm" #n "\n\t"
	__asm__ volatile("movq %0, %%xmm0\n\tpunpcklqdq %%xmm0, %%xmm0\n\t"
		COPY(1) COPY(2) COPY(3) COPY(4) COPY(5) COPY(6) COPY(7) COPY(8) COPY(9) COPY(10) COPY(11) COPY(12) COPY(13) COPY(14) COPY(15)
		: : "r"(with) : "memory");
#define WIDE(n) "vpbroadcastq %0, %%zmm" #n "\n\t"
	if (__builtin_cpu_supports("avx512f"))
		__asm__ volatile(
			WIDE(0) WIDE(1) WIDE(2) WIDE(3) WIDE(4) WIDE(5) WIDE(6) WIDE(7) WIDE(8) WIDE(9) WIDE(10) WIDE(11) WIDE(12) WIDE(13) WIDE(14) WIDE(15)
			WIDE(16) WIDE(17) WIDE(18) WIDE(19) WIDE(20) WIDE(21) WIDE(22) WIDE(23) WIDE(24) WIDE(25) WIDE(26) WIDE(27) WIDE(28) WIDE(29) WIDE(30) WIDE(31)
			: : "r"(with) : "memory");
#elif defined(__aarch64__)
#define DUP(n) "dup v" #n ".2d, %0\n\t"
	__asm__ volatile(
		DUP(0) DUP(1) DUP(2) DUP(3) DUP(4) DUP(5) DUP(6) DUP(7) DUP(16) DUP(17) DUP(18) DUP(19) DUP(20) DUP(21) DUP(22) DUP(23)
		DUP(24) DUP(25) DUP(26) DUP(27) DUP(28) DUP(29) DUP(30) DUP(31)
		: : "r"(with) : "memory");
#endif
}

static num pass(int i, num a, num b, num c, num d, num e, num f) {
	struct control *k = &ctl[i];
	ADD(&k->calls, 1);
	num inside = ADD(&k->inside, 1), most = GET(&k->most);
	while (most < inside && !__atomic_compare_exchange_n(&k->most, &most, inside, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
	if (GET(&k->latency)) usleep(GET(&k->latency));
	while (GET(&k->hold)) usleep(200);
	int fails = GET(&k->left) > 0 && !one(&k->after) && one(&k->left);
	num rv = 0, limit = GET(&k->limit);
	if (i == OPEN_SESSION && limit && GET(&sessions) >= limit) rv = SESSION_COUNT;
	else if (!fails || k->late) rv = real->at[i](a, b, c, d, e, f);
	if (fails) rv = k->rv;
	if (rv == 0 && i == OPEN_SESSION) ADD(&sessions, 1);
	if (rv == 0 && i == CLOSE_SESSION) ADD(&sessions, -1);
	if (rv == 0 && (i == CLOSE_ALL_SESSIONS || i == FINALIZE)) SET(&sessions, 0);
	ADD(&k->inside, -1);
	if (GET(&k->mark)) mark(GET(&k->mark));
	return rv;
}

#define WATCHED X(0) X(1) X(4) X(6) X(12) X(13) X(14) X(15) X(18) X(20) X(21) X(22) X(24) X(26) X(29) X(30) X(33) X(34) X(58) X(64)
#define X(i) static num fn##i(num a, num b, num c, num d, num e, num f) { return pass(i, a, b, c, d, e, f); }
WATCHED
#undef X

num C_GetFunctionList(struct functions **list) {
	int fd = open(getenv("P11FAULT_CTL"), O_RDWR);
	void *module = dlopen(getenv("P11FAULT_MODULE"), RTLD_NOW);
	if (fd < 0 || module == NULL) return 5;
	ctl = mmap(NULL, FUNCTIONS * sizeof *ctl, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	num (*get)(struct functions **) = (num (*)(struct functions **))dlsym(module, "C_GetFunctionList");
	if (ctl == MAP_FAILED || get == NULL || get(&real) != 0) return 5;
	ours = *real;
#define X(i) ours.at[i] = fn##i;
	WATCHED
#undef X
	*list = &ours;
	return 0;
}
