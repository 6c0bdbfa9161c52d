//go:build cgo

package hsm

/*
#cgo linux LDFLAGS: -ldl
#cgo darwin LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>
#include "cryptoki.h"
#include "registers.h"
static struct functions *load(const char *path, void **handle) {
	num (*list)(struct functions **);
	struct functions *f = NULL;
	*handle = dlopen(path, RTLD_LAZY);
	if (*handle == NULL) return NULL;
	list = (num (*)(struct functions **))dlsym(*handle, "C_GetFunctionList");
	if (list == NULL || list(&f) != 0) return NULL;
	return f;
}

static num randomise(struct functions *f, num session, byte *out, num len) {
	num rv = ((random_fn *)f->at[GENERATE_RANDOM])(session, out, len);
	forget();
	return rv;
}

static num login(struct functions *f, num session, num user, byte *pin, num pin_len) {
	num rv = ((login_fn *)f->at[LOGIN])(session, user, pin, pin_len);
	forget();
	return rv;
}

enum { CLASS = 0x00, TOKEN = 0x01, PRIVATE = 0x02, LABEL = 0x03, APPLICATION = 0x10, VALUE = 0x11 };

// keep makes a private data object in the token.
static num keep(struct functions *f, num session, byte *application, num application_len,
                byte *label, num label_len, byte *value, num value_len) {
	num data = 0, object; // CKO_DATA
	byte yes = 1;
	struct attribute all[] = {
		{CLASS, &data, sizeof data}, {TOKEN, &yes, 1}, {PRIVATE, &yes, 1},
		{APPLICATION, application, application_len}, {LABEL, label, label_len}, {VALUE, value, value_len},
	};
	num rv = ((create_fn *)f->at[CREATE_OBJECT])(session, all, sizeof all / sizeof *all, &object);
	forget();
	return rv;
}

// value reads that of an object, and how long it is.
static num value(struct functions *f, num session, num object, byte *out, num *len) {
	struct attribute a = {VALUE, out, *len};
	num rv = ((attributes_fn *)f->at[GET_ATTRIBUTE_VALUE])(session, object, &a, 1);
	*len = a.len;
	forget();
	return rv;
}
*/
import "C"

import (
	"fmt"
	"path/filepath"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// module is one loaded PKCS#11 library. Objects and sessions go through miekg/pkcs11.
// What touches plain keys, the PIN or a link's secret goes through the few lines of C
// above: miekg's Decrypt and GetAttributeValue free what they have read in the C heap
// without wiping it, and CreateObject what it has written; Decrypt leaks that buffer when
// it fails, and asks for the size first (which NSS answers wrongly); its Login wants the
// PIN as a string, which nobody can wipe. Here the module reads from and writes to the
// caller's buffers.
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

// random fills b from the token's generator.
func (m *module) random(s pkcs11.SessionHandle, b []byte) error {
	if rv := C.randomise(m.functions, C.num(s), first(b), C.num(len(b))); rv != pkcs11.CKR_OK {
		return fault("C_GenerateRandom", pkcs11.Error(rv))
	}
	return nil
}

// keep makes a private data object in the token.
func (m *module) keep(s pkcs11.SessionHandle, application, label string, value []byte) error {
	rv := C.keep(m.functions, C.num(s), text(application), C.num(len(application)), text(label), C.num(len(label)), first(value), C.num(len(value)))
	if rv != pkcs11.CKR_OK {
		return fault("C_CreateObject", pkcs11.Error(rv))
	}
	return nil
}

// value reads the value of a data object into b, and returns how long it is.
func (m *module) value(s pkcs11.SessionHandle, o pkcs11.ObjectHandle, b []byte) (int, error) {
	n := C.num(len(b))
	if rv := C.value(m.functions, C.num(s), C.num(o), first(b), &n); rv != pkcs11.CKR_OK {
		return 0, fault("C_GetAttributeValue", pkcs11.Error(rv))
	}
	return int(n), nil
}

// first is b as C sees it; nil if b is empty.
func first(b []byte) *C.byte { return (*C.byte)(unsafe.SliceData(b)) }

// text is s as C sees it, to be read only.
func text(s string) *C.byte { return (*C.byte)(unsafe.StringData(s)) }

// fault says which call of the module failed; nil stays nil. Whatever wraps a
// pkcs11.Error is a fault of the token: see Token.with.
func fault(call string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", call, err)
}
