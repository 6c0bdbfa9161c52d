// The few declarations of PKCS#11 v2.40 (OASIS, pkcs11t.h and pkcs11f.h) that this package
// calls a module with itself. All else goes through miekg/pkcs11.
#pragma once

typedef unsigned long num; // CK_ULONG and every handle
typedef unsigned char byte;

struct mechanism { num type; void *param; num len; };                                  // CK_MECHANISM
struct gcm_params { byte *iv; num iv_len, iv_bits; byte *aad; num aad_len, tag_bits; }; // CK_GCM_PARAMS

typedef num init_fn(num session, struct mechanism *, num key);
typedef num data_fn(num session, byte *in, num in_len, byte *out, num *out_len);
typedef num random_fn(num session, byte *out, num len);
typedef num login_fn(num session, num user, byte *pin, num pin_len);

struct attribute { num type; void *value; num len; }; // CK_ATTRIBUTE
typedef num attributes_fn(num session, num object, struct attribute *, num count);
typedef num create_fn(num session, struct attribute *, num count, num *object);

struct functions { // CK_FUNCTION_LIST of v2.40
	byte version[2];
	void *at[68]; // in the order of the standard
};
enum { LOGIN = 18, CREATE_OBJECT = 20, GET_ATTRIBUTE_VALUE = 24, ENCRYPT_INIT = 29, ENCRYPT, DECRYPT_INIT = 33, DECRYPT, GENERATE_RANDOM = 64 };
