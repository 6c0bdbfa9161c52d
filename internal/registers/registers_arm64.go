package registers

func clearAll()
func peek(to *byte)
