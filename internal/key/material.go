package key

// Material is the secret of a key. Its bytes stand behind a closure, so that no
// formatting verb, logger or encoder can reach them, whether the Material is held
// directly, by pointer or in another struct's unexported field. Reveal is the
// only way in, and its call sites are few enough to read.
type Material struct {
	reveal func() []byte
}

// NewMaterial takes ownership of b: nobody else may keep or change it, and Wipe
// overwrites it.
func NewMaterial(b []byte) Material {
	return Material{reveal: func() []byte { return b }}
}

// Reveal returns the secret bytes themselves, not a copy. Whoever calls it must
// not keep them beyond the Material's life. The zero Material reveals nil.
func (m Material) Reveal() []byte {
	if m.reveal == nil {
		return nil
	}
	return m.reveal()
}

// Bits is the size of the secret in bits.
func (m Material) Bits() int { return 8 * len(m.Reveal()) }

// Wipe overwrites the secret with zeros. All copies of m share it.
func (m Material) Wipe() { clear(m.Reveal()) }

// String says that there is a secret and nothing of it.
func (m Material) String() string { return "[key material]" }
