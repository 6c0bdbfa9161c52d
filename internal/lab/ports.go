package lab

import (
	"slices"

	"github.com/qutemail/kme/internal/lab/freeport"
)

// Ports are the TCP ports of a lab, all on localhost.
type Ports struct {
	KM1, KM2                   [][4]int // of each node: SAE, assign, classical, operator
	SAECA, KMECA, OperatorCA   int
	SAECRL, KMECRL, OperatorCR int // plain HTTP: certificate revocation lists
}

// ReadmePorts are those of `make run`, for so many nodes a site.
func ReadmePorts(nodes int) Ports {
	p := Ports{
		SAECA: 7443, KMECA: 7444, OperatorCA: 7445,
		SAECRL: 7453, KMECRL: 7454, OperatorCR: 7455,
	}
	for i := range nodes {
		p.KM1 = append(p.KM1, [4]int{8443 + 10*i, 8444 + 10*i, 8445 + 10*i, 8446 + 10*i})
		p.KM2 = append(p.KM2, [4]int{9443 + 10*i, 9444 + 10*i, 9445 + 10*i, 9446 + 10*i})
	}
	return p
}

// FreePorts finds ports that nobody listens on, for tests side by side.
func FreePorts(nodes int) (Ports, error) {
	ports := make([]int, 6+8*nodes)
	for i := range ports {
		var err error
		if ports[i], err = freeport.Find(); err != nil {
			return Ports{}, err
		}
	}
	p := Ports{
		SAECA: ports[0], KMECA: ports[1], OperatorCA: ports[2],
		SAECRL: ports[3], KMECRL: ports[4], OperatorCR: ports[5],
	}
	for doors := range slices.Chunk(ports[6:], 8) {
		p.KM1, p.KM2 = append(p.KM1, [4]int(doors[:4])), append(p.KM2, [4]int(doors[4:]))
	}
	return p, nil
}

// shipped are those that a shipped file may name: there each KME has one node.
func (p Ports) shipped() []int {
	return append(slices.Concat(p.KM1[0][:], p.KM2[0][:]), p.SAECA, p.KMECA, p.OperatorCA, p.SAECRL, p.KMECRL, p.OperatorCR)
}

// of are the doors of a KME's nodes.
func (p Ports) of(kme string) [][4]int {
	if kme == "km1" {
		return p.KM1
	}
	return p.KM2
}

// ca is the address of a role's CA.
func (p Ports) ca(role string) int {
	return map[string]int{"sae": p.SAECA, "kme": p.KMECA, "operator": p.OperatorCA}[role]
}

func (p Ports) crl(role string) int {
	return map[string]int{"sae": p.SAECRL, "kme": p.KMECRL, "operator": p.OperatorCR}[role]
}
