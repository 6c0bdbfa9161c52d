package distill

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func sorted(nodes []uint32) []uint32 {
	slices.Sort(nodes)
	return nodes
}

func randomBits(random *rand.Rand, n int) []byte {
	b := make([]byte, packedBytes(n))
	for i := range n {
		setBit(b, i, byte(random.Uint32()&1))
	}
	return b
}

// toeplitz is amplify bit by bit, as it is defined.
func toeplitz(key []byte, keyBits int, seed []byte, length int) []byte {
	out := make([]byte, packedBytes(length))
	rest := keyBits - length
	for i := range length {
		v := bitAt(key, i)
		for j := range rest {
			v ^= bitAt(seed, i-j+rest-1) & bitAt(key, length+j)
		}
		setBit(out, i, v)
	}
	return out
}

func TestAmplifyIsToeplitz(t *testing.T) {
	random := rand.New(rand.NewPCG(11, 11))
	for range 60 {
		n := 2 + random.IntN(9000)
		length := 1 + random.IntN(n)
		key, seed := randomBits(random, n), randomBits(random, n-1)
		if !bytes.Equal(amplify(frameFrom(key), n, seed, length), toeplitz(key, n, seed, length)) {
			t.Fatalf("%d bits to %d: not the product by the matrix", n, length)
		}
	}
}

// However a matrix is cut, its squares cover it once. The last stand out by less than their
// size.
func TestCutCovers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rows, columns := rapid.IntRange(1, 1<<15).Draw(t, "rows"), rapid.IntRange(1, 1<<15).Draw(t, "columns")
		down, across := (rows+63)/64, (columns+63)/64
		covered := make([]byte, down*across)
		for _, q := range cut(rows, columns) {
			if q.row >= down || q.column >= across {
				t.Fatalf("a square at %d, %d of %d, %d words", q.row, q.column, down, across)
			}
			for i := q.row; i < min(down, q.row+q.words); i++ {
				for j := q.column; j < min(across, q.column+q.words); j++ {
					covered[i*across+j]++
				}
			}
		}
		if bytes.Count(covered, []byte{1}) != len(covered) {
			t.Fatalf("%d rows and %d columns are not covered once each", rows, columns)
		}
	})
}

// Middle products are the same whatever they are made of.
func TestMiddle(t *testing.T) {
	random := rand.New(rand.NewPCG(20, 20))
	for _, words := range []int{kernelWords, 2 * kernelWords, 4 * kernelWords, 16 * kernelWords} {
		s, x, got, want := make(frame, 2*words), make(frame, words), make(frame, words), make(frame, words)
		for range 20 {
			for i := range s {
				s[i] = random.Uint64()
			}
			clear(want)
			for i := range x {
				x[i] = random.Uint64()
				for k := range s {
					hi, lo := productPortable(s[k], x[i])
					if at := k + i - words; at >= 0 && at < words {
						want[at] ^= lo
					}
					if at := k + i + 1 - words; at >= 0 && at < words {
						want[at] ^= hi
					}
				}
			}
			newWorkspace(words).middle(got, s, x)
			if !slices.Equal(got, want) {
				t.Fatalf("%d words of %x and %x: %x, want %x", words, s, x, got, want)
			}
		}
	}
}

func TestAmplifyIsLinear(t *testing.T) {
	random := rand.New(rand.NewPCG(12, 12))
	const n, length = 1 << 14, 9741
	seed := randomBits(random, n-1)
	x, y := randomBits(random, n), randomBits(random, n)
	sum := make([]byte, len(x))
	for i := range sum {
		sum[i] = x[i] ^ y[i]
	}
	hx, hy, hs := amplify(frameFrom(x), n, seed, length), amplify(frameFrom(y), n, seed, length), amplify(frameFrom(sum), n, seed, length)
	for i := range hs {
		if hs[i] != hx[i]^hy[i] {
			t.Fatalf("byte %d: not linear", i)
		}
	}
}

// TestToeplitzIsUniversal counts, for every difference of two keys of 12 bits, the
// seeds under which they collide in 4 bits: at most 1 in 16. The hash being linear,
// they collide where their difference hashes to 0.
func TestToeplitzIsUniversal(t *testing.T) {
	const n, length, rest = 12, 4, 8
	for x := 1; x < 1<<n; x++ {
		collisions := 0
		for seed := range 1 << (n - 1) {
			hash := 0
			for i := range length {
				v := x >> i
				for j := range rest {
					v ^= seed >> (i - j + rest - 1) & (x >> (length + j))
				}
				hash |= v & 1
			}
			if hash == 0 {
				collisions++
			}
		}
		if collisions > 1<<(n-1-length) {
			t.Fatalf("difference %#x: %d of %d seeds collide", x, collisions, 1<<(n-1))
		}
	}
}

func drawElement(t *rapid.T, name string) element {
	return element{rapid.Uint64().Draw(t, name+".lo"), rapid.Uint64().Draw(t, name+".hi")}
}

func TestFieldLaws(t *testing.T) {
	one := element{lo: 1}
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := drawElement(t, "a"), drawElement(t, "b"), drawElement(t, "c")
		sum := element{b.lo ^ c.lo, b.hi ^ c.hi}
		ab, ac := a.times(b), a.times(c)
		switch {
		case a.times(one) != a:
			t.Fatal("1 is not neutral")
		case ab != b.times(a):
			t.Fatal("not commutative")
		case ab.times(c) != a.times(b.times(c)):
			t.Fatal("not associative")
		case a.times(sum) != element{ab.lo ^ ac.lo, ab.hi ^ ac.hi}:
			t.Fatal("not distributive")
		}
		power := a // a^(2^128) = a, so that every element but 0 has an inverse
		for range 128 {
			power = power.times(power)
		}
		if power != a {
			t.Fatal("not the field of 2^128 elements")
		}
	})
}

// TestTagIsGHASH compares with the hash inside AES-GCM, which is the same polynomial
// over the same field, with the bits of each byte the other way round.
func TestTagIsGHASH(t *testing.T) {
	random := rand.New(rand.NewPCG(17, 17))
	block, err := aes.NewCipher(randomBits(random, 256))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	var h, mask [16]byte
	block.Encrypt(h[:], h[:])
	mask[15] = 1 // the counter block of a zero nonce
	block.Encrypt(mask[:], mask[:])
	for _, blocks := range []int{1, 2, 63} {
		data := randomBits(random, 128*blocks)
		want := gcm.Seal(nil, make([]byte, 12), nil, data)
		subtle.XORBytes(want, want, mask[:])

		data = binary.BigEndian.AppendUint64(data, uint64(128*blocks))
		data = binary.BigEndian.AppendUint64(data, 0)
		key := newFrame(8 * len(data))
		for i, b := range data {
			key[i/8] |= uint64(bits.Reverse8(b)) << (8 * (i % 8))
		}
		point := h
		for i := range point {
			point[i] = bits.Reverse8(point[i])
		}
		got := tag(key, point)
		for i := range got {
			got[i] = bits.Reverse8(got[i])
		}
		if !bytes.Equal(got[:], want) {
			t.Errorf("%d blocks: got %x, want %x", blocks, got, want)
		}
	}
}

func TestTagTellsKeysApart(t *testing.T) {
	random := rand.New(rand.NewPCG(13, 13))
	for range 200 {
		a, b, _ := noisyPair(random, 1<<10, 0)
		b.flip(random.IntN(1 << 10))
		var point [16]byte
		copy(point[:], randomBits(random, 128))
		if tag(a, point) == tag(b, point) {
			t.Fatalf("equal tags at %s", hex.EncodeToString(point[:]))
		}
	}
}

func TestPlaceAndIndex(t *testing.T) {
	for _, rate := range []float64{1e-6, 0.001, 0.01, 0.05, 0.11, 0.5} {
		for _, n := range []int{1 << 10, 1 << 14, 1 << 18} {
			p := newPasses(n, rate, seedOf(n))
			seen := newFrame(n)
			for i := range n {
				at := p.place(i)
				if p.index(at) != i || seen.get(at) == 1 {
					t.Fatalf("n %d, rate %v: bit %d goes to %d, which comes from %d", n, rate, i, at, p.index(at))
				}
				seen.flip(at)
			}
		}
	}
}

// A key is mixed a word at a time as it is bit by bit.
func TestMix(t *testing.T) {
	random := rand.New(rand.NewPCG(19, 19))
	for _, n := range []int{1 << 12, 1 << 13, 1 << 15, 1 << 18} {
		for _, rate := range []float64{.04, .02, .01, .003} {
			p := newPasses(n, rate, seedOf(n))
			if len(p.deal) < 64 || len(p.shift) < 64 {
				continue
			}
			key, _, _ := noisyPair(random, n, 0)
			got, want := newFrame(n), newFrame(n)
			p.mix(got, key)
			p.mixBits(want, key)
			if !slices.Equal(got, want) {
				t.Errorf("%d bits in blocks of %d: mixed otherwise", n, len(p.shift))
			}
		}
	}
}

func TestParity(t *testing.T) {
	random := rand.New(rand.NewPCG(14, 14))
	const n = 1 << 10
	key, _, _ := noisyPair(random, n, 0)
	v := newView(newPasses(n, 0.02, seedOf(1)), key)
	for pass := range allPasses {
		for node := uint32(1); node < 2*n; node++ {
			var want byte
			leafs := func(node uint32) (from, to int) {
				lo, hi := node, node
				for lo < n {
					lo, hi = 2*lo, 2*hi+1
				}
				return int(lo - n), int(hi - n)
			}
			from, to := leafs(node)
			for at := from; at <= to; at++ {
				switch {
				case pass == 0:
					want ^= key.get(at)
				case pass == shufflePass:
					want ^= key.get(v.index(at))
				default:
					want ^= key.get(at) & v.masks[pass-firstMask].get(at)
				}
			}
			if got := v.parity(pass, node); got != want {
				t.Fatalf("pass %d, node %d: got %d, want %d", pass, node, got, want)
			}
		}
	}
}

// TestSiftIsUniform leaves 3 of 67 matches out, many times: each is left out as often
// as any other (chi square with 67 degrees of freedom, p > 1e-5).
func TestSiftIsUniform(t *testing.T) {
	const n, need, runs = 67, 64, 4000
	matches := make([]byte, packedBytes(n))
	for i := range n {
		setBit(matches, i, 1)
	}
	p := Params{KeyBits: need, TestBits: 0, Intensities: 2}
	var kept [n]int
	for bit := range n {
		values := make([]byte, packedBytes(n))
		setBit(values, bit, 1)
		for run := range runs {
			got := sift(p, seedOf(run*n+bit), matches, make([]byte, len(matches)), values, make([]byte, len(matches)))
			if got.key[0] != 0 {
				kept[bit]++
			}
		}
	}
	const expected = float64(runs) * (n - need) / n
	chi := 0.0
	for _, k := range kept {
		left := float64(runs - k)
		chi += (left - expected) * (left - expected) / (expected * need / n)
	}
	if chi > 125 {
		t.Errorf("chi square %.1f", chi)
	}
}

// TestSiftKeepsTheEndsInStep gives both ends the same bits at the matches and other
// bits elsewhere.
func TestSiftKeepsTheEndsInStep(t *testing.T) {
	random := rand.New(rand.NewPCG(15, 15))
	const n = 3000
	p := Params{KeyBits: 256, TestBits: 101, Intensities: 3}
	matches, bases := randomBits(random, n), randomBits(random, n)
	a, b := randomBits(random, n), randomBits(random, n)
	sent := make([]pulse, n)
	for i := range n {
		sent[i] = pulse{bitAt(a, i), bitAt(bases, i), byte(random.IntN(3))}
		if bitAt(matches, i) == 1 && bitAt(a, i) != bitAt(b, i) {
			b[i>>3] ^= 1 << (i & 7)
		}
	}
	from := planes(p, matches, sentOf(sent))
	atA, atB := sift(p, seedOf(1), matches, bases, a, from), sift(p, seedOf(1), matches, bases, b, from)
	if !slices.Equal(atA.key, atB.key) || !bytes.Equal(atA.test, atB.test) || atA.used != atB.used {
		t.Error("the ends sifted different bits")
	}
	if atA.used.key.total() != p.KeyBits || atA.used.test.total() != p.TestBits {
		t.Errorf("used: %v", atA.used)
	}
	if other := sift(p, seedOf(2), matches, bases, a, from); slices.Equal(atA.key, other.key) {
		t.Error("the seed does not matter")
	}
	// Every bit has the intensity that it was sent with: flip those of one and look.
	for k := range byte(3) {
		flipped := bytes.Clone(a)
		for i := range n {
			if sent[i].intensity == k {
				flipped[i>>3] ^= 1 << (i & 7)
			}
		}
		other := sift(p, seedOf(1), matches, bases, flipped, from)
		if n := atA.wrong(other.test); n[k] != atA.used.test[k] || n.total() != n[k] {
			t.Errorf("intensity %d: test bits that differ: %v of %v", k, n, atA.used.test)
		}
		if n := atA.corrected(other.key); n[k] != atA.used.key[k] || n.total() != n[k] {
			t.Errorf("intensity %d: key bits that differ: %v of %v", k, n, atA.used.key)
		}
	}
}

// pick moves bits like a loop over them.
func TestPick(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mask := frame(rapid.SliceOfN(rapid.OneOf(rapid.Uint64(), rapid.SampledFrom([]uint64{0, 1, 1 << 63, ^uint64(0)})), 1, 5).Draw(t, "mask"))
		column := frame(rapid.SliceOfN(rapid.Uint64(), len(mask), len(mask)).Draw(t, "column"))
		want, at := make(frame, (mask.ones()+63)/64), 0
		for i := range 64 * len(mask) {
			if mask.get(i) == 1 {
				want[at/64] |= uint64(column.get(i)) << (at % 64)
				at++
			}
		}
		if got := pick(mask, mask, column); !slices.Equal(got[1], want) || got[0].ones() != at {
			t.Fatalf("mask %x of %x: %x, want %x", mask, column, got[1], want)
		}
		portable := []frame{make(frame, len(want))}
		if pickPortable(portable, mask, []frame{column}); !slices.Equal(portable[0], want) {
			t.Fatalf("mask %x of %x: %x without instructions for it, want %x", mask, column, portable[0], want)
		}
	})
}

// The hash of a transcript is the polynomial of its messages, one coefficient after the other.
func TestTranscriptIsPolynomial(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pad := padNamed(PadName{Index: rapid.IntRange(1, 1000).Draw(t, "pad")})
		var a authenticator
		a.arm(pad)
		point, want := elementFrom([16]byte(pad.Bits[:16])), element{}
		add := func(e element) { want = want.plus(e).times(point) }
		for _, size := range rapid.SliceOfN(rapid.IntRange(0, 300), 1, 5).Draw(t, "sizes") {
			body := rapid.SliceOfN(rapid.Byte(), size, size).Draw(t, "body")
			a.record(alice, kindSifted, body)
			add(element{lo: uint64(alice)<<8 | uint64(kindSifted), hi: uint64(size)})
			for ; len(body) > 0; body = body[min(16, len(body)):] {
				var piece [16]byte
				copy(piece[:], body)
				add(elementFrom(piece))
			}
		}
		if a.sum != want {
			t.Fatalf("%v, want %v", a.sum, want)
		}
	})
}

// BenchmarkSift is what an end does between the light and reconciliation, for a key of 2^21
// bits of the lab's light: an end's part, per detection.
func BenchmarkSift(b *testing.B) {
	const n = 3_600_000
	random := rand.New(rand.NewPCG(21, 21))
	biased := func(of int) []byte { // one bit in of is set
		bits := make([]byte, packedBytes(n))
		for i := range n {
			if random.IntN(of) == 0 {
				setBit(bits, i, 1)
			}
		}
		return bits
	}
	p := Params{KeyBits: 1 << 21, Intensities: 3}
	sent := Sent{Bits: biased(2), Bases: biased(5), Low: biased(2), High: make([]byte, packedBytes(n))}
	theirs := biased(5)
	p.TestBits = n / 30
	begun := cpuTime()
	for b.Loop() {
		matches := equalBits(sent.Bases, theirs, n)
		tally(matches, theirs)
		sift(p, seedOf(1), matches, theirs, sent.Bits, planes(p, matches, sent))
	}
	b.ReportMetric(float64((cpuTime()-begun).Nanoseconds())/float64(b.N)/n, "cpu-ns/detection")
}

// BenchmarkAmplify halves blocks of 1 Mbit.
func BenchmarkAmplify(b *testing.B) {
	const n = 1 << 20
	random := rand.New(rand.NewPCG(16, 16))
	key, seed := frameFrom(randomBits(random, n)), randomBits(random, n-1)
	begun := cpuTime()
	for b.Loop() {
		amplify(key, n, seed, n/2)
	}
	b.ReportMetric(n*float64(b.N)/b.Elapsed().Seconds()/1e6, "Mbit/s")
	b.ReportMetric(n*float64(b.N)/(cpuTime()-begun).Seconds()/1e6, "Mbit/cpu-s")
}

// kernels are those that this processor has.
var kernels = map[string]func(out *[kernelWords]uint64, s *[2 * kernelWords]uint64, x *[kernelWords]uint64){"kernel": kernel}

// TestXor: sums are the same in whatever pieces they are made, and nothing behind them changes.
func TestXor(t *testing.T) {
	random := rand.New(rand.NewPCG(18, 18))
	for n := range 70 {
		a, b := make(frame, n), make(frame, n)
		for i := range n {
			a[i], b[i] = random.Uint64(), random.Uint64()
		}
		got, want := make(frame, n+8), make(frame, n)
		xor(got[:n], a, b)
		xorPortable(want, a, b)
		if !slices.Equal(got[:n], want) || got[n:].ones() != 0 {
			t.Fatalf("%d words: %x, want %x", n, got, want)
		}
	}
}

// The assembly does what the portable functions do.
func TestProducts(t *testing.T) {
	random := rand.New(rand.NewPCG(17, 17))
	var s [2 * kernelWords]uint64
	var x, fast, slow [kernelWords]uint64
	for i := range 2000 {
		for k := range s {
			s[k] = random.Uint64() >> (i % 60)
		}
		for k := range x {
			x[k] = random.Uint64()
		}
		kernelPortable(&slow, &s, &x)
		for name, fastest := range kernels {
			if fastest(&fast, &s, &x); fast != slow {
				t.Fatalf("%s of %x and %x: %x, portable %x", name, s, x, fast, slow)
			}
		}
		hi, lo := product(s[0], x[0])
		if h, l := productPortable(s[0], x[0]); h != hi || l != lo {
			t.Fatalf("product of %x and %x: %x %x, portable %x %x", s[0], x[0], hi, lo, h, l)
		}
		hi, lo = 0, 0
		for k := range 64 { // bit by bit
			if x[0]>>k&1 == 1 {
				lo ^= s[0] << k
				hi ^= s[0] >> 1 >> (63 - k)
			}
		}
		if h, l := productPortable(s[0], x[0]); h != hi || l != lo {
			t.Fatalf("portable product of %x and %x: %x %x, bit by bit %x %x", s[0], x[0], h, l, hi, lo)
		}
	}
}
