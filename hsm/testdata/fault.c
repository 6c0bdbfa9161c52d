// A PKCS#11 module that passes every call on to another one and, where told,
// counts it, holds it up or answers with an error of its own: instead of passing it
// on, or after having done so (late).
//
// P11FAULT_MODULE names the module behind it. P11FAULT_CTL names a file of one
// struct control for each function, which the test maps and changes while we run.
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

enum { FUNCTIONS = 68 };
struct control { num rv, left, late, hold, calls, inside, most; };
struct functions { unsigned char version[2]; any_fn *at[FUNCTIONS]; };

static struct functions *real, ours;
static struct control *ctl;

static num pass(int i, num a, num b, num c, num d, num e, num f) {
	struct control *k = &ctl[i];
	__atomic_add_fetch(&k->calls, 1, __ATOMIC_SEQ_CST);
	num inside = __atomic_add_fetch(&k->inside, 1, __ATOMIC_SEQ_CST), most = __atomic_load_n(&k->most, __ATOMIC_SEQ_CST);
	while (most < inside && !__atomic_compare_exchange_n(&k->most, &most, inside, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
	while (__atomic_load_n(&k->hold, __ATOMIC_SEQ_CST)) usleep(200);
	num rv = 0, left = __atomic_load_n(&k->left, __ATOMIC_SEQ_CST);
	while (left > 0 && !__atomic_compare_exchange_n(&k->left, &left, left - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
	if (left == 0 || k->late) rv = real->at[i](a, b, c, d, e, f);
	if (left > 0) rv = k->rv;
	__atomic_sub_fetch(&k->inside, 1, __ATOMIC_SEQ_CST);
	return rv;
}

#define WATCHED X(0) X(6) X(12) X(13) X(18) X(20) X(21) X(29) X(30) X(33) X(34) X(58) X(64)
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
