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
struct control { num rv, left, after, late, hold, latency, limit, calls, inside, most; };
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
