//go:build cgo

package hsm

/*
#cgo linux LDFLAGS: -ldl
#cgo darwin LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

typedef unsigned long num; // CK_ULONG and every handle
typedef unsigned char byte;

struct mechanism { num type; void *param; num len; };                                  // CK_MECHANISM
struct gcm_params { byte *iv; num iv_len, iv_bits; byte *aad; num aad_len, tag_bits; }; // CK_GCM_PARAMS

typedef num init_fn(num session, struct mechanism *, num key);
typedef num data_fn(num session, byte *in, num in_len, byte *out, num *out_len);
typedef num random_fn(num session, byte *out, num len);
typedef num login_fn(num session, num user, byte *pin, num pin_len);

struct functions { // CK_FUNCTION_LIST of v2.40
	byte version[2];
	void *at[68]; // in the order of the standard
};
enum { LOGIN = 18, ENCRYPT_INIT = 29, ENCRYPT, DECRYPT_INIT = 33, DECRYPT, GENERATE_RANDOM = 64 };

static struct functions *load(const char *path, void **handle) {
	num (*list)(struct functions **);
	struct functions *f = NULL;
	*handle = dlopen(path, RTLD_LAZY);
	if (*handle == NULL) return NULL;
	list = (num (*)(struct functions **))dlsym(*handle, "C_GetFunctionList");
	if (list == NULL || list(&f) != 0) return NULL;
	return f;
}

struct outcome { num rv, len; int begun; };

// gcm does one whole operation in one crossing. IV and tag lengths are constants
// here because SoftHSM takes an empty IV or a tag of no bits without complaint.
static struct outcome gcm(init_fn *init, data_fn *data, num session, num key, byte *iv,
                          byte *aad, num aad_len, byte *in, num in_len, byte *out, num out_len) {
	struct gcm_params p = {iv, 12, 96, aad, aad_len, 128};
	struct mechanism m = {0x1087, &p, sizeof p}; // CKM_AES_GCM
	struct outcome o = {0, out_len, 0};
	if ((o.rv = init(session, &m, key)) != 0) return o;
	o.begun = 1;
	o.rv = data(session, in, in_len, out, &o.len);
	return o;
}

static struct outcome seal(struct functions *f, num session, num key, byte *iv,
                           byte *aad, num aad_len, byte *in, num in_len, byte *out, num out_len) {
	return gcm(f->at[ENCRYPT_INIT], f->at[ENCRYPT], session, key, iv, aad, aad_len, in, in_len, out, out_len);
}

static struct outcome unseal(struct functions *f, num session, num key, byte *iv,
                             byte *aad, num aad_len, byte *in, num in_len, byte *out, num out_len) {
	return gcm(f->at[DECRYPT_INIT], f->at[DECRYPT], session, key, iv, aad, aad_len, in, in_len, out, out_len);
}

static num randomise(struct functions *f, num session, byte *out, num len) {
	return ((random_fn *)f->at[GENERATE_RANDOM])(session, out, len);
}

static num login(struct functions *f, num session, num user, byte *pin, num pin_len) {
	return ((login_fn *)f->at[LOGIN])(session, user, pin, pin_len);
}
*/
import "C"

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// module is one loaded PKCS#11 library. Objects and sessions go through miekg/pkcs11.
// What touches plain keys or the PIN goes through the few lines of C above: miekg's
// Decrypt frees the plain key in the C heap without wiping it, leaks that buffer when
// decryption fails, and asks for the size first (which NSS answers wrongly); its Login
// wants the PIN as a string, which nobody can wipe. Here the module reads from and
// writes to the caller's buffers.
type module struct {
	*pkcs11.Ctx
	args      string // for C_Initialize; "" for none
	weak      bool   // Config.WeakAttributes
	functions *C.struct_functions
	handle    unsafe.Pointer
}

// load opens the library at path without initialising it.
func load(path, args string) (*module, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("PKCS#11 module %q is not an absolute path", path)
	}
	m := &module{Ctx: pkcs11.New(path), args: args}
	if m.Ctx == nil {
		return nil, fmt.Errorf("PKCS#11 module %q cannot be loaded", path)
	}
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	if m.functions = C.load(name, &m.handle); m.functions == nil {
		m.unload()
		return nil, fmt.Errorf("PKCS#11 module %q gives no function list", path)
	}
	return m, nil
}

// initialise is C_Initialize, with the module's arguments if it needs any (NSS does).
func (m *module) initialise() error {
	if m.args == "" {
		return fault("C_Initialize", m.Initialize())
	}
	args := C.CString(m.args)
	defer C.free(unsafe.Pointer(args))
	return fault("C_Initialize", m.Initialize(pkcs11.InitializeWithReserved(unsafe.Pointer(args))))
}

// login logs the process in as user. The caller wipes the PIN.
func (m *module) login(s pkcs11.SessionHandle, user uint, pin []byte) error {
	if rv := C.login(m.functions, C.num(s), C.num(user), first(pin), C.num(len(pin))); rv != pkcs11.CKR_OK {
		return fault("C_Login", pkcs11.Error(rv))
	}
	return nil
}

// unload gives the library back. It must be finalized.
func (m *module) unload() {
	if m.handle != nil {
		C.dlclose(m.handle)
	}
	m.Destroy()
}

// seal encrypts plain into blob, which must have room for exactly the tag more.
func (m *module) seal(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, iv, aad, plain, blob []byte) error {
	if len(iv) != IVBytes || len(plain) == 0 || len(blob) != len(plain)+TagBytes {
		return fmt.Errorf("sealing refused: IV of %d bytes, payload of %d, room for %d", len(iv), len(plain), len(blob))
	}
	o := C.seal(m.functions, C.num(s), C.num(key), first(iv),
		first(aad), C.num(len(aad)), first(plain), C.num(len(plain)), first(blob), C.num(len(blob)))
	switch {
	case o.rv != pkcs11.CKR_OK && o.begun == 0:
		return fault("C_EncryptInit", pkcs11.Error(o.rv))
	case o.rv != pkcs11.CKR_OK:
		return fault("C_Encrypt", pkcs11.Error(o.rv))
	case int(o.len) != len(blob):
		return fault(fmt.Sprintf("C_Encrypt gave %d bytes, not %d", o.len, len(blob)), pkcs11.Error(pkcs11.CKR_DEVICE_ERROR))
	}
	return nil
}

// errRefused: C_Decrypt gave the answer of a wrong tag, and perhaps of a broken token.
var errRefused = errors.New("blob refused")

// dataErrors are what modules answer to a wrong tag. SoftHSM says GENERAL_ERROR,
// which is also what it says when it is broken.
var dataErrors = []pkcs11.Error{
	pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_DATA_INVALID,
	pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE,
	0x42, // CKR_AEAD_DECRYPT_FAILED, PKCS#11 v3.0
}

// unseal decrypts blob into plain, which must be as long as blob (some modules
// want room for the tag as well), and returns how many bytes of it are the payload.
// If it fails, nothing is left in plain.
func (m *module) unseal(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, iv, aad, blob, plain []byte) (int, error) {
	if len(iv) != IVBytes || len(blob) <= TagBytes || len(plain) != len(blob) {
		return 0, fmt.Errorf("opening refused: IV of %d bytes, blob of %d, room for %d", len(iv), len(blob), len(plain))
	}
	o := C.unseal(m.functions, C.num(s), C.num(key), first(iv),
		first(aad), C.num(len(aad)), first(blob), C.num(len(blob)), first(plain), C.num(len(plain)))
	if o.rv != pkcs11.CKR_OK || int(o.len) != len(blob)-TagBytes {
		clear(plain)
	}
	switch {
	case o.rv != pkcs11.CKR_OK && o.begun == 0:
		return 0, fault("C_DecryptInit", pkcs11.Error(o.rv))
	case slices.Contains(dataErrors, pkcs11.Error(o.rv)):
		return 0, fmt.Errorf("%w: %w", errRefused, fault("C_Decrypt", pkcs11.Error(o.rv)))
	case o.rv != pkcs11.CKR_OK:
		return 0, fault("C_Decrypt", pkcs11.Error(o.rv))
	case int(o.len) != len(blob)-TagBytes:
		return 0, fault(fmt.Sprintf("C_Decrypt gave %d bytes, not %d", o.len, len(blob)-TagBytes), pkcs11.Error(pkcs11.CKR_DEVICE_ERROR))
	}
	return int(o.len), nil
}

// random fills b from the token's generator.
func (m *module) random(s pkcs11.SessionHandle, b []byte) error {
	if rv := C.randomise(m.functions, C.num(s), first(b), C.num(len(b))); rv != pkcs11.CKR_OK {
		return fault("C_GenerateRandom", pkcs11.Error(rv))
	}
	return nil
}

// first is b as C sees it; nil if b is empty.
func first(b []byte) *C.byte { return (*C.byte)(unsafe.SliceData(b)) }

// fault says which call of the module failed; nil stays nil. Whatever wraps a
// pkcs11.Error is a fault of the token: see Token.with.
func fault(call string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", call, err)
}
