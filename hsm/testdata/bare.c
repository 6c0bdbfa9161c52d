// The limit that the benchmarks measure against: AES-GCM by C_EncryptInit, C_Encrypt
// and so on in a bare loop, on the key of that label in that token.
//
//   bare MODULE TOKEN PINFILE KEY
//
// reads lines "wrap|unwrap token|session WORKERS N", does N operations in each of so
// many threads, each with a session of its own, on the token object or a session copy of
// it, and answers with the nanoseconds of wall clock and of CPU time that it took. One
// worker is a thread beside the first one too: glibc spares a process that has never had
// a second thread its locks, which no server is spared.
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef unsigned long num;
typedef unsigned char byte;
struct list { byte version[2]; void *at[68]; };
struct attribute { num type; void *value; num len; };
struct mechanism { num type; void *param; num len; };
struct gcm { byte *iv; num iv_len, iv_bits; byte *aad; num aad_len, tag_bits; };
typedef num fn(num, ...);

enum { INITIALIZE = 0, GET_SLOT_LIST = 4, GET_TOKEN_INFO = 6, OPEN_SESSION = 12, LOGIN = 18, COPY = 21,
	FIND_INIT = 26, FIND, FIND_FINAL, ENCRYPT_INIT = 29, ENCRYPT, DECRYPT_INIT = 33, DECRYPT };

static struct list *p11;

static void must(const char *what, num rv) {
	if (rv == 0) return;
	fprintf(stderr, "bare: %s: %#lx\n", what, rv);
	exit(1);
}

#define CALL(i, ...) ((num (*)(num, ...))p11->at[i])(__VA_ARGS__)

struct job { num session, key, n; int unwrap; };

static void *work(void *arg) {
	struct job *j = arg;
	byte iv[12] = {0}, aad[150] = {0}, plain[32] = {0}, blob[48];
	struct gcm p = {iv, 12, 96, aad, sizeof aad, 128};
	struct mechanism m = {0x1087, &p, sizeof p};
	num len;
	for (num i = 0; i < j->n + 1; i++) {
		if (!j->unwrap || i == 0) {
			memcpy(iv, &i, sizeof i);
			must("C_EncryptInit", CALL(ENCRYPT_INIT, j->session, &m, j->key));
			len = sizeof blob;
			must("C_Encrypt", CALL(ENCRYPT, j->session, plain, (num)sizeof plain, blob, &len));
			continue;
		}
		byte out[48];
		must("C_DecryptInit", CALL(DECRYPT_INIT, j->session, &m, j->key));
		len = sizeof out;
		must("C_Decrypt", CALL(DECRYPT, j->session, blob, (num)sizeof blob, out, &len));
	}
	return NULL;
}

static long long nanoseconds(clockid_t clock) {
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv) {
	if (argc != 5) return 2;
	void *module = dlopen(argv[1], RTLD_NOW);
	if (module == NULL) return 2;
	must("C_GetFunctionList", ((num (*)(struct list **))dlsym(module, "C_GetFunctionList"))(&p11));
	struct { void *mutexes[4]; num flags; void *reserved; } args = {{0}, 2, NULL}; // CKF_OS_LOCKING_OK
	must("C_Initialize", ((num (*)(void *))p11->at[INITIALIZE])(&args));
	num slots[64], n = 64, slot = 0, session, key, found;
	must("C_GetSlotList", CALL(GET_SLOT_LIST, (num)1, slots, &n));
	char label[33];
	snprintf(label, sizeof label, "%-32s", argv[2]);
	for (num i = 0; i < n; i++) {
		byte info[512];
		must("C_GetTokenInfo", CALL(GET_TOKEN_INFO, slots[i], info));
		if (memcmp(info, label, 32) == 0) slot = slots[i];
	}
	char pin[256] = {0};
	FILE *f = fopen(argv[3], "r");
	if (f == NULL || fgets(pin, sizeof pin, f) == NULL) return 2;
	pin[strcspn(pin, "\n")] = 0;
	must("C_OpenSession", CALL(OPEN_SESSION, slot, (num)4, NULL, NULL, &session));
	must("C_Login", CALL(LOGIN, session, (num)1, pin, (num)strlen(pin)));
	struct attribute match = {3, argv[4], strlen(argv[4])}; // CKA_LABEL
	must("C_FindObjectsInit", CALL(FIND_INIT, session, &match, (num)1));
	must("C_FindObjects", CALL(FIND, session, &key, (num)1, &found));
	must("C_FindObjectsFinal", CALL(FIND_FINAL, session));
	if (found != 1) return 2;
	byte no = 0;
	struct attribute not_token = {1, &no, 1}; // CKA_TOKEN
	num copy;
	must("C_CopyObject", CALL(COPY, session, key, &not_token, (num)1, &copy));

	char op[16], kind[16];
	int workers;
	while (scanf("%15s %15s %d %lu", op, kind, &workers, &n) == 4) {
		struct job jobs[64];
		pthread_t threads[64];
		for (int i = 0; i < workers; i++) {
			jobs[i] = (struct job){0, strcmp(kind, "token") ? copy : key, n, strcmp(op, "wrap") != 0};
			must("C_OpenSession", CALL(OPEN_SESSION, slot, (num)4, NULL, NULL, &jobs[i].session));
		}
		long long wall = nanoseconds(CLOCK_MONOTONIC), cpu = nanoseconds(CLOCK_PROCESS_CPUTIME_ID);
		for (int i = 0; i < workers; i++) pthread_create(&threads[i], NULL, work, &jobs[i]);
		for (int i = 0; i < workers; i++) pthread_join(threads[i], NULL);
		wall = nanoseconds(CLOCK_MONOTONIC) - wall;
		cpu = nanoseconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
		for (int i = 0; i < workers; i++) CALL(13, jobs[i].session);
		printf("%lld %lld\n", wall, cpu);
		fflush(stdout);
	}
	return 0;
}
